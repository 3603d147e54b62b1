"""Makes a model give the same bits before saving and after loading.

The memory address of a tensor decides the last bit of some float kernels (MKL's product of a matrix and one vector).
Torch allocates at multiples of 64 bytes. A tensor of a mapped file starts wherever the header of the file ends.
So float tensors at other addresses are copied once, when a model is compressed or loaded.
"""

from torch import nn

ALIGNMENT = 64


def align_tensors(model: nn.Module) -> None:
    """Copy the float tensors on the CPU at other addresses. Codes stay where they are: sums of integers are exact."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
