"""The journey of one trial: open, plan, tighten, save, measure, score. The one place that knows all of it."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from taut.core.environment import environment
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.record import Quantity, Record, Score
from taut.core.registry import TASKS
from taut.core.spec import TrialSpec
from taut.data import calibration_texts
from taut.healing.heal import compress_and_heal
from taut.measurement.clock import ratio
from taut.measurement.count import Footprint, cache_bytes, count, flops_per_token, folder_bytes
from taut.measurement.energy import energy
from taut.measurement.kernels import kernel_path
from taut.measurement.memory import peak_memory
from taut.measurement.speed import filled_cache, forward_case, speed
from taut.methods.base import PartMethod
from taut.surgery.apply import is_compressed, save, sites_of, steps_of
from taut.surgery.loading import Source, open_model, open_skeleton, open_tokenizer, resolve
from taut.surgery.plan import Plan, make_plan

Tell = Callable[[str], None]
GENEROUS_BASE = 1.5e9
"""Bytes of the bare process with its libraries."""


def validate(spec: TrialSpec) -> str | None:
    """Why this trial cannot work, or None. Raises TautError for input that is wrong as such (no such model)."""
    source = resolve(spec.model)
    for task in spec.tasks:
        _task(task)
    if not spec.recipe:
        return None
    try:
        make_plan(open_skeleton(source), Recipe.parse(spec.recipe, spec.recipe_name))
    except TautError as error:
        return str(error)
    return None


def estimate(spec: TrialSpec) -> dict[str, float]:
    """``seconds`` and ``bytes`` of memory, roughly: weights a few times over, and a pass over the tasks' data."""
    described = open_skeleton(resolve(spec.model))
    parameters = sum(tensor.numel() for tensor in described.parameters())
    weights = 4.0 * parameters
    memory = spec.measure.get("memory")
    seconds = 4 + parameters * (2e-7 * (1 + len(spec.tasks)) + (1e-7 if spec.measure.get("latency") else 0))
    return {"seconds": seconds + (12 if memory else 0), "bytes": GENEROUS_BASE + 4 * weights}


def run(spec: TrialSpec, report: Tell) -> Record:
    """The whole trial. Every step says what it is doing through ``report``."""
    started, clock = datetime.now(UTC).isoformat(timespec="milliseconds"), time.monotonic()
    source = resolve(spec.model)
    dtype = getattr(torch, spec.dtype)
    torch.manual_seed(spec.seed)
    report("opening and compressing")
    model, plan = _opened(source, spec, dtype)
    costs = {"compress_seconds": Quantity(value=time.monotonic() - clock, unit="s", how="open, calibrate, fit, heal")}
    scores: list[Score] = []
    options = spec.measure
    for task in spec.tasks:
        report(f"task {task['name']}")
        needs = TASKS.get(task["name"]).needs_reference
        reference = open_model(source, dtype, spec.device, spec.seed) if needs else None
        found = _task(task).evaluate(model, _tokenizer(source), seed=spec.seed, reference=reference)
        scores += found
    report("counting")
    found = _footprint(model)
    with saved(model) as folder:
        costs |= sizes(model, found, folder, (options.get("latency") or {}).get("length", 128))
        if options.get("memory"):
            report("peak memory, in a fresh process")
            costs["peak_bytes"] = peak(folder, spec.device, options.get("latency") or {})
    latency = options.get("latency")
    if latency:
        report("latency")
        dense = open_model(source, dtype, spec.device, spec.seed) if plan else model
        costs |= latencies(model, dense, latency)
    if options.get("energy"):
        costs["energy_joules"] = energy(forward_case(model, sample_inputs(model, 1, 128)), device=spec.device)
    threads = (latency or {}).get("threads") or torch.get_num_threads()
    return spec.record(
        "done",
        scores=tuple(scores),
        costs=costs,
        bytes_per_slot={slot: share.stored for slot, share in found.slots.items()},
        plan=tuple(step.to_dict() for step in plan.steps) if plan else (),
        untouched=plan.untouched if plan else (),
        environment=environment(threads) | {"kernels": kernel_path(spec.device)},
        started=started,
        seconds=time.monotonic() - clock,
    )


def evaluate(
    model: str | Path | PreTrainedModel,
    task: str,
    options: dict[str, Any],
    tokenizer: Any,
    reference: str | Path | PreTrainedModel | None,
    seed: int,
    device: str,
    dtype: torch.dtype | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Score, ...]:
    """One task on one model; see ``taut.evaluate``."""
    chosen = _task({"name": task, **options})
    source = resolve(model) if isinstance(model, str | Path) else None
    opened = open_model(source, dtype, device, seed) if source else model
    tokenizer = tokenizer or (_tokenizer(source) if source else None)
    if tokenizer is None:
        raise TautError("evaluate: a model in memory needs its tokenizer=")
    if isinstance(reference, str | Path):
        reference = open_model(resolve(reference), dtype, device, seed)
    return chosen.evaluate(opened, tokenizer, seed=seed, progress=progress, reference=reference)


def measure(
    model: str | Path | PreTrainedModel,
    against: str | Path | PreTrainedModel | None,
    options: Mapping[str, Any],
    device: str,
    dtype: torch.dtype | None,
    seed: int,
    progress: Tell | None,
) -> dict[str, Quantity]:
    """Everything measurable about one model; see ``taut.measure``."""
    tell = progress or (lambda text: None)
    tell("opening")
    opened = open_model(resolve(model), dtype, device, seed) if isinstance(model, str | Path) else model
    other = open_model(resolve(against), dtype, device, seed) if isinstance(against, str | Path) else against
    tell("counting")
    found = _footprint(opened)
    with saved(opened) as folder:
        costs = sizes(opened, found, folder, options.get("length", 128))
        for slot, share in found.slots.items():
            costs[f"stored_bytes {slot}"] = Quantity(value=share.stored, unit="bytes", how="of the state dict")
        tell("peak memory, in a fresh process")
        costs["peak_bytes"] = peak(folder, device, options)
    tell("latency")
    costs |= latencies(opened, other if other is not None else opened, options)
    tell("energy")
    inputs = sample_inputs(opened, options.get("batch", 1), options.get("length", 128))
    costs["energy_joules"] = energy(forward_case(opened, inputs), device=device)
    return costs


def footprint(model: PreTrainedModel) -> str:
    """One line: class, parameters, stored bytes per slot, share of dense, recipe."""
    found = _footprint(model)
    slots = ", ".join(f"{slot} {_bytes(share.stored)}" for slot, share in found.slots.items() if share.stored)
    recipe = model.hf_quantizer.quantization_config.recipe if is_compressed(model) else None
    return (
        f"{type(model).__name__} {found.parameters / 1e6:.2f} M parameters in {_bytes(found.stored)} "
        f"({8 * found.stored / found.parameters:.2f} bits each): {slots}; "
        + (f"recipe {recipe}" if recipe is not None else "not compressed")
    )


@contextmanager
def saved(model: PreTrainedModel) -> Iterator[Path]:
    """The model in a folder that vanishes afterwards: sizes are those of real files."""
    with tempfile.TemporaryDirectory(prefix="taut-") as temporary:
        folder = Path(temporary) / "model"
        save(model, folder)
        yield folder


def sizes(model: PreTrainedModel, found: Footprint, folder: Path, length: int) -> dict[str, Quantity]:
    """Bytes and FLOPs for ``length`` tokens; ``file_bytes`` is read from the disk."""
    files = folder_bytes(folder)
    inputs = sample_inputs(model, 1, length)
    cache = filled_cache(model, inputs)
    costs = {
        "logical_parameters": Quantity(value=found.parameters, unit="parameters", how="counted, shared tensors once"),
        "stored_bytes": Quantity(value=found.stored, unit="bytes", how="tensors of the state dict, shared ones once"),
        "file_bytes": Quantity(value=files.total, unit="bytes", how=f"size of {len(files.files)} saved weight file(s)"),
        "resident_bytes": Quantity(value=found.resident, unit="bytes", how="storages of all tensors held, each once"),
        "flops_per_token": _flops(model, inputs),
    }
    if cache is not None:
        tokens = inputs["input_ids"].shape[1]
        how = f"tensors of the cache after {tokens} tokens"
        costs["cache_bytes_per_token"] = Quantity(value=cache_bytes(cache) / tokens, unit="bytes/token", how=how)
    return costs


def _flops(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Quantity:
    """Counted by PyTorch; what its counter cannot see on a CPU (integer kernels) is added as predicted."""
    counted = flops_per_token(model, inputs)
    if not is_compressed(model) or model.device.type != "cpu":
        return counted
    hidden = [step for step in steps_of(model) if isinstance(step.method, PartMethod) and step.method.uncounted]
    if not hidden:
        return counted
    unseen = sum(step.cost.flops_per_token for step in hidden)
    how = f"{counted.how}; {len(hidden)} parts that it cannot see as predicted"
    return counted.model_copy(update={"value": counted.value + unseen, "how": how})


def latencies(model: PreTrainedModel, dense: PreTrainedModel, options: Mapping[str, Any]) -> dict[str, Quantity]:
    """Prefill and decode, interleaved with ``dense`` when it is another model; ratios are model / dense."""
    inputs = sample_inputs(model, options.get("batch", 1), options.get("length", 128))
    models = {"model": model} if dense is model else {"model": model, "dense": dense}
    timed = speed(
        models,
        inputs,
        decode_tokens=options.get("decode", 0),
        repeats=options.get("repeats", 20),
        threads=options.get("threads"),
    )
    mine = timed["model"].quantities()
    costs = {"latency_prefill": mine["forward"], "throughput": mine["throughput"]}
    if timed["model"].decode is not None:
        costs["latency_decode"] = mine["decode"]
    if "dense" in timed:
        costs["latency_prefill_ratio"] = ratio(timed["model"].forward, timed["dense"].forward)
        if timed["model"].decode is not None and timed["dense"].decode is not None:
            costs["latency_decode_ratio"] = ratio(timed["model"].decode, timed["dense"].decode)
    return costs


def peak(folder: Path, device: str, options: Mapping[str, Any]) -> Quantity:
    """Peak memory of a fresh process that loads ``folder`` and runs one forward pass."""
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


def _opened(source: Source, spec: TrialSpec, dtype: torch.dtype) -> tuple[PreTrainedModel, Plan | None]:
    if not spec.recipe:
        return open_model(source, dtype, spec.device, spec.seed), None
    texts = calibration_texts(spec.text, [_task(task).evaluated() for task in spec.tasks])
    recipe = Recipe.parse(spec.recipe, spec.recipe_name)
    where = {"dtype": dtype, "device": spec.device, "seed": spec.seed}
    return compress_and_heal(source, recipe, texts, spec.heal, text=spec.text, **where)


def _footprint(model: PreTrainedModel) -> Footprint:
    """Per slot; a packed part counts for the parameters it stands for."""
    steps = steps_of(model) if is_compressed(model) else ()
    parts = {step.site.path: step.cost.parameters for step in steps if isinstance(step.method, PartMethod)}
    return count(model, sites_of(model), {path: number for path, number in parts.items() if _is_packed(model, path)})


def _is_packed(model: PreTrainedModel, path: str) -> bool:
    tensors = model.get_submodule(path).state_dict().values()
    return any(not tensor.is_floating_point() for tensor in tensors)


def _task(task: dict[str, Any]) -> Any:
    options = {key: value for key, value in task.items() if key != "name"}
    return TASKS.get(task["name"]).parse(options, f"task {task['name']}")


def _tokenizer(source: Source) -> Any:
    tokenizer = open_tokenizer(source)
    if tokenizer is None:
        raise TautError(f"{source.name}: no tokenizer there, and a task needs one")
    return tokenizer


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
