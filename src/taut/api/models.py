"""Inspect, change and train models."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from taut.api.sources import (
    RecipeLike,
    check_models,
    check_out,
    read_dtype,
    read_recipe,
    read_texts,
    use_threads,
)
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.registry import list_methods

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from taut.healing.settings import HealingChoices, HealingOptions
    from taut.measurement.count import Footprint
    from taut.surgery.plan import Plan
    from taut.surgery.tune import Tuning
    from taut.training.run import Trained
    from taut.training.spec import TrainSpec
    from taut.training.trainer import Moment


def methods(kind: str | None = None) -> list[dict[str, Any]]:
    """List the methods: id, one-line summary, source, dial, and knobs with their defaults and meanings.

    ``kind`` is embedding, linear, attention or memory; None lists all. Raises TautError for another kind.
    """
    return list_methods(kind)


def plan(model: "str | Path | PreTrainedModel", recipe: RecipeLike, length: int | None = None) -> "Plan":
    """Say what ``recipe`` would do to ``model``, site by site, with exact bytes.

    Reads only the config of a folder, Hub id, ``minilm`` or scratch spec, and no weight. ``length`` is the declared n
    of attention and memory costs. Raises TautError for wrong input.
    """
    chosen = read_recipe(recipe)
    check_models(model)
    from taut.surgery.loading import open_skeleton, resolve
    from taut.surgery.plan import make_plan

    described = open_skeleton(resolve(model)) if isinstance(model, str | Path) else model
    return make_plan(described, chosen, length)


def apply(
    model: "str | Path | PreTrainedModel",
    recipe: RecipeLike,
    out: str | Path | None = None,
    *,
    text: str | Path | None = "builtin",
    exclude: Sequence[str] = (),
    batches: "Iterable[dict[str, torch.Tensor]]" = (),
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    heal: "int | HealingOptions" = 0,
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    healing: Progress | None = None,
) -> "PreTrainedModel":
    """Compress a model and return it; with ``out``, also write a complete folder there.

    A ``model`` in memory is changed in place, and ``taut.undo`` restores it bit for bit. A folder, Hub id, ``minilm``
    or scratch spec is opened first. Methods that calibrate then run ``text`` (``builtin``, a text file, or None)
    through the original. For a model in memory, pass ``batches`` of model inputs instead, and a ``tokenizer`` for
    methods that read the vocabulary.

    ``heal`` trains the installed parts to answer as the original did, on the same text. It is a number of steps, or
    several options by name (see ``taut.healing.settings``). With ``out``, repeating the call continues an interrupted
    run. ``exclude`` names evaluation data such as ``stsb:dev``; no text with one of its sentences is used. Raises
    TautError for wrong input.
    """
    chosen = read_recipe(recipe)
    check_models(model)
    check_out(out)
    dtype = read_dtype(dtype)
    from taut.surgery import apply as surgery
    from taut.surgery.loading import resolve
    from taut.surgery.prepare import prepare

    if not isinstance(model, str | Path):
        if heal:
            raise TautError("apply: a model in memory is healed by taut.heal(model, original, ...)")
        surgery.apply(model, chosen, batches, tokenizer=tokenizer, seed=seed, progress=progress)
        if out is not None:
            surgery.save(model, out)
        return model
    source = resolve(model)
    prepared = prepare(source, chosen, dtype=dtype)
    texts = read_texts(text, exclude)
    if heal:
        from taut.healing.heal import compress_and_heal

        compressed = compress_and_heal(
            prepared,
            texts,
            heal,
            device=device,
            seed=seed,
            text=str(text),
            # Beside the output, under a name that the next run with the same --out finds.
            state=None if out is None else Path(out).with_name(f".{Path(out).name}.heal"),
            progress=progress,
            healing=healing,
        )
    else:
        compressed = surgery.compress(prepared, texts, device=device, seed=seed, progress=progress)
    if out is not None:
        surgery.save(compressed, out, source.folder)
    return compressed


def heal(
    model: "PreTrainedModel",
    original: "PreTrainedModel",
    texts: Iterable[str] = (),
    steps: int = 200,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    batches: "Sequence[dict[str, torch.Tensor]]" = (),
    state: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **choices: "Unpack[HealingChoices]",
) -> dict[str, Any]:
    """Train what a recipe installed in ``model``, in place, to answer as ``original`` does.

    Returns what the model's config then says about healing: steps, seed, target, first and last loss. Pass ``texts``
    with their ``tokenizer``, or ``batches`` of model inputs. With the folder ``state``, repeating the call continues
    an interrupted run. ``choices``: see ``taut.healing.settings``. Raises TautError for wrong input.
    """
    from taut.healing.heal import heal as run

    chosen = {"steps": steps, "seed": seed, **choices}
    return run(model, original, texts, chosen, tokenizer=tokenizer, batches=batches, state=state, progress=progress)


def train(
    spec: "str | Path | dict[str, Any] | TrainSpec",
    out: str | Path | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: "Callable[[Moment], None] | None" = None,
) -> "Trained":
    """Train a language model as ``spec`` says, and write a complete folder with the training record in it.

    ``spec`` is a YAML file or a mapping; see ``taut.training.spec``. Training starts from scratch or from a checkpoint,
    with or without a recipe. ``out`` is ``runs/NAME`` of the file by default. Repeating the call continues an
    interrupted run. Under torchrun or accelerate launch the processes share every batch. Raises TautError for wrong
    input.
    """
    from taut.training.spec import TrainSpec

    check_models(TrainSpec.load(spec).model)
    from taut.training.run import train as run

    use_threads(threads)
    return run(spec, out, device=device, progress=progress)


def anchor_token(
    model: str | Path,
    out: str | Path,
    *,
    token: str = "<anchor>",
    after: Sequence[str] = (".", "!", "?"),
    start: str = "mean",
) -> Path:
    """Write a copy of ``model`` whose tokenizer puts ``token`` behind each of the strings ``after``.

    Train the copy with the memory ``anchor`` and ``anchors: [TOKEN]``. ``start`` sets the first values of the token's
    row: ``mean`` of all rows, or a copy of the row of the token that it names. Raises TautError for wrong input and for
    a model without a tokenizer.
    """
    check_models(model)
    check_out(out)
    from taut.surgery.anchor_token import add_anchor_token, write
    from taut.surgery.loading import open_model, open_tokenizer, resolve

    source = resolve(model)
    tokenizer = open_tokenizer(source)
    if tokenizer is None:
        raise TautError(f"{model}: has no tokenizer that could write the token")
    opened = open_model(source)
    return write(opened, add_anchor_token(opened, tokenizer, token, after, start), source, out)


def tune(
    model: "str | Path | PreTrainedModel", threads: Sequence[int] = (), *, progress: Progress | None = None
) -> "Tuning":
    """Measure where a dense copy of a structured map is faster than the map itself, on this machine.

    Every structured map of a compressed model is measured with 1 to 1,024 tokens. From then on the model uses the
    faster form. A copy costs memory, and its results differ in the last bits.

    For a folder, the result is stored in its config.json. Opening the folder on the same kind of processor makes the
    copies. ``threads`` are the numbers of threads to measure; default: the present one. Raises TautError for a model
    that is not compressed or has no such map.
    """
    check_models(model)
    from taut.surgery.tune import tune as measure_maps

    return measure_maps(model, threads, progress=progress)


def undo(model: "PreTrainedModel") -> "PreTrainedModel":
    """Restore a model that was compressed in memory, bit for bit, and return it.

    Raises TautError for a model that is not compressed or was loaded in compressed form.
    """
    from taut.surgery.apply import undo as take_out

    take_out(model)
    return model


def load(
    model: str | Path, *, dtype: "str | torch.dtype | None" = None, device: str = "cpu", seed: int = 0
) -> "PreTrainedModel":
    """Open a model, compressed or not, in the class that fits it.

    Raises TautError for wrong input and for any missing or unexpected key.
    """
    check_models(model)
    from taut.surgery.loading import open_model, resolve

    return open_model(resolve(model), read_dtype(dtype), device, seed)


def show(folder: str | Path) -> dict[str, Any]:
    """Describe a model folder: recipe, steps, original, tensors and bytes. Reads only headers, no tensor.

    Raises TautError if the folder is not a model folder.
    """
    from taut.surgery.inspect import inspect

    return inspect(Path(folder))


def export(model: "str | Path | PreTrainedModel", out: str | Path) -> list[tuple[str, str]]:
    """Write a plain dense checkpoint for tools without taut.

    Returns (name, reason) of each site that has no dense equivalent. Raises TautError if the model is not compressed
    or ``out`` cannot be written.
    """
    check_models(model)
    check_out(out)
    from taut.surgery.export import export as write

    if isinstance(model, str | Path):
        return write(load(model), out, Path(model))
    return write(model, out)


def footprint(model: "str | Path | PreTrainedModel") -> "Footprint":
    """Count the parameters and bytes of a model, slot by slot.

    ``str`` of the result is one line to paste into an issue: class, parameters, bytes per slot, recipe. A folder, Hub
    id, ``minilm`` or scratch spec is opened first. Raises TautError for wrong input.
    """
    check_models(model)
    from taut.studies.costs import footprint_of

    return footprint_of(load(model) if isinstance(model, str | Path) else model)
