"""One function per verb, for ``taut.X`` and for the command line alike. No logic lives here: rooms do the work."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.record import Quantity, Score
from taut.core.registry import METHODS

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from taut.ledger import Ledger
    from taut.runner import Outcome
    from taut.surgery.plan import Plan

Progress = Callable[[int, int], None]
RecipeLike = str | Path | dict | Recipe


def methods(kind: str | None = None) -> list[dict[str, Any]]:
    """Every method there is: id, one-line summary, source, dial, knobs with their defaults and meanings."""
    found = []
    for key in METHODS.ids(kind):
        method = METHODS.get(key)
        knobs = {
            name: {"default": field.get_default(), "description": field.description or ""}
            for name, field in method.Knobs.model_fields.items()
        }
        row = {"id": key, "summary": method.summary, "source": method.source, "dial": method.dial, "knobs": knobs}
        found.append(row)
    return found


def plan(model: "str | Path | PreTrainedModel", recipe: RecipeLike, length: int | None = None) -> "Plan":
    """What ``recipe`` would do to ``model``, site by site, with exact bytes; from a config alone, no weight is read.

    ``length`` is the declared n of attention and memory costs. Raises TautError for wrong input.
    """
    from taut.surgery.plan import make
    from taut.surgery.source import open_skeleton, resolve

    described = open_skeleton(resolve(model)) if isinstance(model, str | Path) else model
    return make(described, Recipe.load(recipe), length)


def apply(
    model: "str | Path | PreTrainedModel",
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    text: str | Path | None = "builtin",
    batches: "Iterable[dict[str, torch.Tensor]]" = (),
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> "PreTrainedModel":
    """Tighten a model and return it; with ``out``, also write a complete folder there.

    ``model`` in memory is changed in place and ``taut.undo`` restores it to the bit. A folder, Hub id, ``minilm`` or
    scratch spec is opened first; methods that calibrate then run ``text`` (``builtin``, a text file, or None) through
    the original. In memory, give them ``batches`` of model inputs instead. Raises TautError for wrong input.
    """
    from taut.surgery import apply as surgery
    from taut.surgery.source import resolve

    if out is not None:
        surgery.check_writable(Path(out).absolute())
    if not isinstance(model, str | Path):
        surgery.apply(model, Recipe.load(recipe), batches, progress=progress)
        if out is not None:
            surgery.save(model, out)
        return model
    source = resolve(model)
    tightened, _ = surgery.tighten(
        source,
        Recipe.load(recipe),
        _texts(text),
        dtype=_dtype(dtype),
        device=device,
        seed=seed,
        progress=progress,
    )
    if out is not None:
        surgery.save(tightened, out, source.folder)
    return tightened


def undo(model: "PreTrainedModel") -> "PreTrainedModel":
    """Take every part out of a model that was tightened in memory, to the bit."""
    from taut.surgery.apply import undo as take_out

    take_out(model)
    return model


def load(
    model: str | Path, *, dtype: "str | torch.dtype | None" = None, device: str = "cpu", seed: int = 0
) -> "PreTrainedModel":
    """Open a model, tightened or not: picks the class, and raises TautError for any missing or unexpected key."""
    from taut.surgery.source import open_model, resolve

    return open_model(resolve(model), _dtype(dtype), device, seed)


def show(folder: str | Path) -> dict[str, Any]:
    """What is inside a folder: recipe, steps, where it came from, and its bytes per slot; read from headers alone."""
    from taut.surgery.inspect import inspect

    return inspect(Path(folder))


def export(model: "str | Path | PreTrainedModel", out: str | Path) -> list[tuple[str, str]]:
    """Write a plain dense checkpoint for tools without taut; returns the sites (name, reason) that have no dense
    equivalent. Raises TautError when the model is not tightened or ``out`` cannot be written."""
    from taut.surgery.apply import check_writable
    from taut.surgery.export import export as write

    check_writable(Path(out).absolute())
    if isinstance(model, str | Path):
        return write(load(model), out, Path(model))
    return write(model, out)


def footprint(model: "PreTrainedModel") -> str:
    """One line to paste into an issue: class, parameters, bytes per slot, recipe."""
    from taut.trial import footprint as describe

    return describe(model)


def evaluate(
    model: "str | Path | PreTrainedModel",
    task: str,
    *,
    data: str | Path | None = None,
    tokenizer: Any = None,
    reference: "str | Path | PreTrainedModel | None" = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[Score, ...]:
    """Scores of a model on one task, each beside its shortcut baselines. Raises TautError for wrong input."""
    from taut.trial import evaluate as run

    options = options if data is None else {**options, "data": str(data)}
    return run(model, task, options, tokenizer, reference, seed, device, _dtype(dtype), progress)


def measure(
    model: "str | Path | PreTrainedModel",
    *,
    against: "str | Path | PreTrainedModel | None" = None,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> dict[str, Quantity]:
    """Size, FLOPs, latency, memory and energy of a model; with ``against``, interleaved ratios to another one."""
    from taut.trial import measure as run

    return run(model, against, options, device, _dtype(dtype), seed, progress)


def compare(
    study: str | Path,
    recipes: Sequence[str] = (),
    *,
    ledger: str | Path | None = None,
    report: str | Path | None = None,
    figures: str | Path | None = None,
    only: Sequence[str] = (),
    device: str | None = None,
    threads: int | None = None,
    **options: Any,
) -> "Outcome":
    """Run a study, resuming what the ledger holds, and draw the report.

    ``study`` is a YAML file; or a MODEL, with ``recipes`` (files, names or a shipped set such as ``light``) and
    further fields of a study as ``options`` (tasks, seeds, measure, limits, dtype). ``only`` names the recipes to run
    (``dense`` and ``identity`` always are). The ledger is a folder, ``runs/NAME`` by default. Raises TautError for
    wrong input, before anything runs.
    """
    from taut import runner

    use_threads(threads)
    outcome = runner.compare(study, recipes, ledger=ledger, only=only, device=device, threads=threads, **options)
    if not outcome.interrupted and (report is not None or figures is not None):
        draw(outcome.ledger, report, figures=figures)
    return outcome


def report(ledger: "Ledger | str | Path", out: str | Path | None, *, figures: str | Path | None = None) -> Path | None:
    """Draw the report of a ledger: one self-contained page, and PNG figures with ``figures``."""
    from taut.reporting.page import write

    return write(ledger, out, figures)


draw = report
"""The verb under a second name, for ``compare``, whose option ``report`` hides it."""


def check(method: str, families: Sequence[str] = (), knobs: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Run the contract suite on one method; a row per check and case: ``passed``, ``skipped`` or ``failed``, why."""
    from taut.contract.suite import run

    return run(method, tuple(families), knobs)


def use_threads(threads: int | None) -> None:
    """Processor threads for everything from here on; None leaves them as they are."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def _texts(text: str | Path | None) -> Iterable[str]:
    from taut.data import calibration_texts

    return () if text is None else calibration_texts(text)


def _dtype(dtype: Any) -> Any:
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TautError(f"dtype = {dtype!r}: expected float32, bfloat16, float16 or float64")
    return found
