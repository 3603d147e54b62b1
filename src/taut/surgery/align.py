"""The same bits before saving and after loading.

Where a tensor lies in memory decides the last bit of some float kernels (MKL's product of a matrix and one vector).
What torch allocates lies at a multiple of 64 bytes; a tensor of a mapped file lies wherever the header of the file
happens to end. So float tensors that lie elsewhere are copied once, when a model is compressed or loaded.
"""

from torch import nn

ALIGNMENT = 64


def align_tensors(model: nn.Module) -> None:
    """Copy the floating tensors on the CPU that lie elsewhere. Codes stay: sums of integers are exact."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()
