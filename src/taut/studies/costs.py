"""What a model costs: bytes, FLOPs, latency, peak memory, energy. Used by trials and by ``taut.measure``."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from taut.core.record import Measurements, Quantity
from taut.core.site import Site, TableSite
from taut.measurement.clock import ratio
from taut.measurement.count import Footprint, cache_bytes, count, flops_per_token, folder_bytes
from taut.measurement.energy import energy
from taut.measurement.memory import peak_memory
from taut.measurement.speed import filled_cache, forward_case, speed
from taut.methods.base import PartMethod
from taut.surgery.apply import is_compressed, save, sites_of, steps_of
from taut.surgery.loading import open_model, resolve

Report = Callable[[str], None]
"""Called with a few words on what is being done."""


def measure(
    model: str | Path | PreTrainedModel,
    against: str | Path | PreTrainedModel | None = None,
    *,
    options: Mapping[str, Any],
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
    report: Report = lambda text: None,
) -> Measurements:
    """Measure all costs of one model; see ``taut.measure``. ``options`` are those of ``latencies``."""
    report("opening")
    subject = open_model(resolve(model), dtype, device, seed) if isinstance(model, str | Path) else model
    other = open_model(resolve(against), dtype, device, seed) if isinstance(against, str | Path) else against
    report("counting")
    footprint = footprint_of(subject)
    with saved(subject) as folder:
        costs = sizes(subject, footprint, folder, options.get("length", 128))
        for slot, share in footprint.slots.items():
            costs[f"stored_bytes {slot}"] = Quantity(value=share.stored, unit="bytes", how="of the state dict")
        report("peak memory, in a fresh process")
        costs["peak_bytes"] = peak(folder, device, options)
    report("latency")
    costs |= latencies(subject, subject if other is None else other, options)
    report("energy")
    inputs = sample_inputs(subject, options.get("batch", 1), options.get("length", 128))
    costs["energy_joules"] = energy(forward_case(subject, inputs), device=device)
    return Measurements(costs)


def footprint_of(model: PreTrainedModel, sites: Sequence[Site] | None = None) -> Footprint:
    """Count parameters and bytes of each slot. A packed part counts as the parameters that it stands for.

    ``sites`` are the model's sites if they are known already, for example from its plan.
    """
    steps = steps_of(model) if is_compressed(model) else ()
    parts = {step.site.path: step.cost.parameters for step in steps if isinstance(step.method, PartMethod)}
    counted = count(
        model,
        sites_of(model) if sites is None else sites,
        {path: number for path, number in parts.items() if _is_packed(model, path)},
    )
    recipe = model.hf_quantizer.quantization_config.recipe if is_compressed(model) else None
    return replace(counted, recipe=recipe)


@contextmanager
def saved(model: PreTrainedModel) -> Iterator[Path]:
    """Save the model in a folder that is removed afterwards, so that sizes are those of real files."""
    with tempfile.TemporaryDirectory(prefix="taut-") as temporary:
        folder = Path(temporary) / "model"
        save(model, folder)
        yield folder


def sizes(model: PreTrainedModel, footprint: Footprint, folder: Path, length: int) -> dict[str, Quantity]:
    """Count bytes and FLOPs for ``length`` tokens. ``file_bytes`` is read from the disk."""
    files = folder_bytes(folder)
    inputs = sample_inputs(model, 1, length)
    cache = filled_cache(model, inputs)
    stored, resident = "tensors of the state dict, shared ones once", "storages of all tensors held, each once"
    costs = {
        "logical_parameters": _counted(footprint.parameters, "parameters", "counted, shared tensors once"),
        "stored_bytes": _counted(footprint.stored, "bytes", stored),
        "file_bytes": _counted(files.total, "bytes", f"size of {len(files.files)} saved weight file(s)"),
        "resident_bytes": _counted(footprint.resident, "bytes", resident),
        "flops_per_token": flops_of(model, inputs),
    }
    if cache is not None:
        tokens = inputs["input_ids"].shape[1]
        how = f"tensors of the cache after {tokens} tokens"
        costs["cache_bytes_per_token"] = _counted(cache_bytes(cache) / tokens, "bytes/token", how)
    return costs


def latencies(model: PreTrainedModel, dense: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, Quantity]:
    """Time prefill and decoding, interleaved with ``dense`` if it is another model. Ratios are model / dense.

    ``options``: ``batch``, ``length``, ``decode``, ``repeats``, ``threads``, as in a study's ``latency``.
    """
    inputs = sample_inputs(model, options.get("batch", 1), options.get("length", 128))
    models = {"model": model} if dense is model else {"model": model, "dense": dense}
    timed = speed(
        models,
        inputs,
        decode_tokens=options.get("decode", 0),
        repeats=options.get("repeats", 20),
        threads=options.get("threads"),
    )
    quantities = timed["model"].quantities()
    costs = {"latency_prefill": quantities["forward"], "throughput": quantities["throughput"]}
    if timed["model"].decode is not None:
        costs["latency_decode"] = quantities["decode"]
    if "dense" in timed:
        costs["latency_prefill_ratio"] = ratio(timed["model"].forward, timed["dense"].forward)
        if timed["model"].decode is not None and timed["dense"].decode is not None:
            costs["latency_decode_ratio"] = ratio(timed["model"].decode, timed["dense"].decode)
    return costs


def peak(folder: Path, device: str, options: Mapping[str, Any]) -> Quantity:
    """Measure peak memory in a fresh process that loads ``folder`` and runs one forward pass."""
    return peak_memory(
        folder,
        batch=options.get("batch") or 1,
        length=options.get("length") or 128,
        device=device,
        threads=options.get("threads") or 1,
    )["peak"]


def sample_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random ids (B, T), the same for every model with this vocabulary."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(5, vocabulary, (batch, length), generator=generator).to(model.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})


def _counted(value: float, unit: str, how: str) -> Quantity:
    return Quantity(value=value, unit=unit, how=how)


def flops_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Quantity:
    """Counted by PyTorch, but for the parts whose kernels its counter cannot see: those count as predicted."""
    predicted: dict[tuple[str, ...], float] = {}
    for step in steps_of(model) if is_compressed(model) else ():
        if isinstance(step.method, PartMethod) and step.method.uncounted:
            users = (*step.site.copies, *step.site.heads) if isinstance(step.site, TableSite) else ()
            predicted[step.site.path, *users] = step.cost.flops_per_token
    return flops_per_token(model, inputs, predicted)


def _is_packed(model: PreTrainedModel, path: str) -> bool:
    tensors = model.get_submodule(path).state_dict().values()
    return any(not tensor.is_floating_point() for tensor in tensors)
