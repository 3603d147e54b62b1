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
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from taut.crossover import Crossovers
    from taut.ledger import Ledger
    from taut.retrieval.encoder import Encoder
    from taut.retrieval.index import Index
    from taut.runner import Outcome
    from taut.surgery.plan import Plan
    from taut.training.loop import Moment
    from taut.training.run import Trained
    from taut.training.spec import TrainSpec

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
    exclude: Sequence[str] = (),
    batches: "Iterable[dict[str, torch.Tensor]]" = (),
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    heal: int | dict[str, Any] = 0,
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    healing: Progress | None = None,
) -> "PreTrainedModel":
    """Tighten a model and return it; with ``out``, also write a complete folder there.

    ``model`` in memory is changed in place and ``taut.undo`` restores it to the bit. A folder, Hub id, ``minilm`` or
    scratch spec is opened first; methods that calibrate then run ``text`` (``builtin``, a text file, or None) through
    the original. In memory, give them ``batches`` of model inputs instead, and methods that read the vocabulary a
    ``tokenizer``.

    ``heal`` is a number of steps, or choices by name (see ``taut.training.settings``), for training what was installed
    to answer as the original did, on the same text. With ``out`` a run that was cut off goes on when it is repeated.
    ``exclude`` names evaluation data (``stsb:dev``) of which no sentence may be read. Raises TautError for wrong input.
    """
    from taut.surgery import apply as surgery
    from taut.surgery.source import resolve

    if out is not None:
        surgery.check_writable(Path(out).absolute())
    if not isinstance(model, str | Path):
        if heal:
            raise TautError("apply: a model in memory is healed by taut.heal(model, original, ...)")
        surgery.apply(model, Recipe.load(recipe), batches, tokenizer=tokenizer, seed=seed, progress=progress)
        if out is not None:
            surgery.save(model, out)
        return model
    source = resolve(model)
    options = {"dtype": _dtype(dtype), "device": device, "seed": seed, "progress": progress}
    texts = _texts(text, exclude)
    if heal:
        from taut.training.heal import tighten_and_heal

        # Beside the output, under a name that the next run with the same --out finds.
        options |= {
            "text": str(text),
            "healing": healing,
            "state": out and Path(out).with_name(f".{Path(out).name}.heal"),
        }
        tightened, _ = tighten_and_heal(source, Recipe.load(recipe), texts, heal, **options)
    else:
        tightened, _ = surgery.tighten(source, Recipe.load(recipe), texts, **options)
    if out is not None:
        surgery.save(tightened, out, source.folder)
    return tightened


def heal(
    model: "PreTrainedModel",
    original: "PreTrainedModel",
    texts: Iterable[str] = (),
    steps: int = 200,
    *,
    tokenizer: Any = None,
    batches: "Sequence[dict[str, torch.Tensor]]" = (),
    state: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **choices: Any,
) -> dict[str, Any]:
    """Train what a recipe installed in ``model``, in place, to answer as ``original`` does; returns what the model's
    config now says about it (steps, seed, target, loss at both ends).

    ``texts`` need the ``tokenizer``; or give ``batches`` of model inputs. With the folder ``state`` a run that was cut
    off goes on there. ``choices``: see ``taut.training.settings``. Raises TautError for wrong input.
    """
    from taut.training.heal import heal as train

    chosen = {"steps": steps, "seed": seed, **choices}
    return train(model, original, texts, chosen, tokenizer=tokenizer, batches=batches, state=state, progress=progress)


def train(
    spec: "str | Path | dict[str, Any] | TrainSpec",
    out: str | Path | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: "Callable[[Moment], None] | None" = None,
) -> "Trained":
    """Train a language model as ``spec`` says (a YAML file, or a mapping; see ``taut.training.spec``), from scratch or
    from a checkpoint, with or without a recipe, and write a complete folder with the record beside it.

    ``out`` is ``runs/NAME`` of the file by default. What was cut off goes on when the call is repeated. Under torchrun
    or accelerate launch the processes share every batch. Raises TautError for wrong input.
    """
    from taut.training.run import train as run

    use_threads(threads)
    return run(spec, out, device=device, progress=progress)


def calibrate(
    model: "str | Path | PreTrainedModel", threads: Sequence[int] = (), *, progress: Progress | None = None
) -> "Crossovers":
    """Measure, for every structured map of a tightened model and every number of tokens, whether a dense copy is faster
    on this machine; from then on the faster one answers. A copy costs memory, and its last bits are other ones.

    A folder keeps the result in its config.json, and makes the copies when it is opened on the same processor.
    ``threads`` are the numbers of threads to measure; default: the present one. Raises TautError for a model that is
    not tightened or has no such map.
    """
    from taut.crossover import calibrate as measure_maps

    return measure_maps(model, threads, progress=progress)


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


def vectors(
    model: "str | Path | PreTrainedModel",
    tokenizer: Any = None,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    seed: int = 0,
) -> "Encoder":
    """Sentence vectors of a model: ``encode(sentences, width)`` gives unit rows, ``index(documents, code)`` something
    to search in. Pooling is what the model's folder says, else the mean. Raises TautError for wrong input."""
    from taut.retrieval.encoder import open_encoder

    return open_encoder(
        model, tokenizer, pooling=pooling, max_length=max_length, dtype=_dtype(dtype), device=device, seed=seed
    )


def index(
    model: "str | Path | PreTrainedModel",
    documents: str | Path | Sequence[str],
    out: str | Path | None = None,
    *,
    tokenizer: Any = None,
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> "Index":
    """An index of documents by their sentence vectors; with ``out``, also written to that folder.

    ``documents`` is a list, or the name of a text: its paragraphs, or its lines where none is blank. ``options``: code
    (float, int8, binary, pq), width, rotate, bytes, finer. Raises TautError for wrong input.
    """
    from taut.retrieval.encoder import documents_of
    from taut.surgery.apply import check_writable

    if out is not None:
        check_writable(Path(out).absolute())
    texts = documents_of(documents) if isinstance(documents, str | Path) else documents
    encoder = vectors(model, tokenizer, dtype=dtype, device=device, seed=seed)
    built = encoder.index(texts, keep_texts=True, seed=seed, progress=progress, **options)
    if out is not None:
        built.save(out)
    return built


def search(
    index: "str | Path | Index",
    queries: Sequence[str],
    k: int = 10,
    *,
    model: "str | Path | PreTrainedModel | None" = None,
    tokenizer: Any = None,
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    candidates: int | None = None,
) -> list[list[dict[str, Any]]]:
    """The k nearest documents of each query, as ``score``, ``id`` and ``text``. ``model`` None is the one the index was
    made with. Raises TautError for wrong input."""
    from taut.retrieval.index import Index

    opened = index if isinstance(index, Index) else Index.load(index)
    encoder = vectors(model or opened.model, tokenizer, dtype=dtype, device=device)
    return opened.describe(opened.search(encoder.encode(queries), k, candidates=candidates))


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


def _texts(text: str | Path | None, exclude: Sequence[str] = ()) -> Iterable[str]:
    from taut.data import Data, calibration_texts

    taken = [Data(name, "all", tuple((row,) for row in calibration_texts(name))) for name in exclude]
    return () if text is None else calibration_texts(text, taken)


def _dtype(dtype: Any) -> Any:
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TautError(f"dtype = {dtype!r}: expected float32, bfloat16, float16 or float64")
    return found
