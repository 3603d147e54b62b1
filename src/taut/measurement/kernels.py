"""Names the kernels behind a time: kernels and times depend on processor, build and device."""

import torch


def kernel_path(device: str = "cpu") -> dict[str, str]:
    """The processor's vector instructions, the libraries behind matrix products, and the device's name."""
    chosen = torch.device(device)
    path = {
        "device": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "matrix products": "oneDNN, MKL" if torch.backends.mkldnn.is_available() else "MKL",
        "quantized engine": torch.backends.quantized.engine,
    }
    if chosen.type == "cuda":
        path["tf32"] = str(torch.backends.cuda.matmul.allow_tf32)
    return path
