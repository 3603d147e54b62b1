"""Reads joules if the machine allows it: Intel and AMD packages through RAPL, NVIDIA cards through NVML."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from taut.core.record import Quantity
from taut.measurement.clock import synchronize

POWERCAP = Path("/sys/class/powercap")


def energy(
    run: Callable[[], Any],
    *,
    device: torch.device | str = "cpu",
    minimum_seconds: float = 1.0,
    powercap: Path = POWERCAP,
) -> Quantity:
    """Joules per call of ``run``, called for at least ``minimum_seconds``; None if no counter is readable.

    The counters cover the whole processor package or card, including idle power and other work on it.
    """
    device = torch.device(device)
    read = _card(device) if device.type == "cuda" else _packages(powercap)
    if read is None:
        source = "NVML" if device.type == "cuda" else f"{powercap}"
        return Quantity(value=None, unit="J", how=f"not readable: no energy counter in {source}")
    run()
    synchronize(device)
    before, start, calls = read(), time.perf_counter(), 0
    while time.perf_counter() - start < minimum_seconds:
        run()
        synchronize(device)
        calls += 1
    spent = read()
    joules = sum((after - begun) % span for (begun, span), (after, _) in zip(before, spent, strict=True))
    counter = "NVML, whole card" if device.type == "cuda" else "RAPL, whole packages"
    return Quantity(value=joules / calls, unit="J", how=f"{counter}, mean of {calls} calls, idle power included")


Reading = list[tuple[float, float]]
"""For each counter: the joules so far, and the joules after which it starts again from zero."""


def _packages(powercap: Path) -> Callable[[], Reading] | None:
    """A reader of one counter per processor package; the domains inside a package would be counted twice."""
    folders = [path for path in sorted(powercap.glob("intel-rapl:*")) if path.name.count(":") == 1]

    def read() -> Reading:
        return [(_microjoules(path / "energy_uj"), _microjoules(path / "max_energy_range_uj")) for path in folders]

    try:
        return read if read() else None
    except (OSError, ValueError):
        return None


def _microjoules(path: Path) -> float:
    return int(path.read_text()) * 1e-6


def _card(device: torch.device) -> Callable[[], Reading] | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    # Find the card by its PCI address: NVML numbers cards in its own way and ignores CUDA_VISIBLE_DEVICES.
    card = torch.cuda.get_device_properties(device)
    address = f"{card.pci_domain_id:08X}:{card.pci_bus_id:02X}:{card.pci_device_id:02X}.0"
    handle, total = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByPciBusId_v2(address.encode(), ctypes.byref(handle)):
        return None

    def read() -> Reading:
        library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
        return [(total.value * 1e-3, float("inf"))]

    failed = library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(total))
    return None if failed else read
