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
    """List the methods.

    Parameters
    ----------
    kind : str, optional
        embedding, linear, attention or memory; default: all.

    Returns
    -------
    list of dict
        For each method its ``id``, ``summary``, ``source``, ``dial``, and ``knobs`` with defaults and meanings.

    Raises
    ------
    TautError
        For another kind.

    Examples
    --------
    >>> [row["id"] for row in taut.methods("memory")][:2]
    ['memory.anchor', 'memory.attention_score']
    """
    return list_methods(kind)


def plan(model: "str | Path | PreTrainedModel", recipe: RecipeLike, length: int | None = None) -> "Plan":
    """Say what a recipe would do to a model, site by site, with exact bytes. Reads no weight.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, Hub id, ``minilm``, scratch spec, or a model in memory.
    recipe : str, Path, dict or Recipe
        A YAML file, the name of a shipped recipe, a mapping from slots to methods, or a recipe.
    length : int, optional
        Tokens n for which the costs of attention and memory are declared.

    Returns
    -------
    Plan
        ``steps``, the costs ``before`` and ``after``, and what stays ``untouched`` with the reason.

    Raises
    ------
    TautError
        For a model that cannot be opened, and for a recipe that is wrong or does not fit it.

    Examples
    --------
    >>> plan = taut.plan("minilm", {"embedding": {"method": "low_rank", "rank": 96}})
    >>> plan.before.bytes, plan.after.bytes  # (30522, 384) becomes (30522, 96) and (96, 384), in float32
    (46881792, 11867904)
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
    """Compress a model, and with ``out`` also write a complete folder.

    A model in memory is changed in place, and ``taut.undo`` restores it bit for bit.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, Hub id, ``minilm``, scratch spec, or a model in memory.
    recipe : str, Path, dict or Recipe
        A YAML file, the name of a shipped recipe, a mapping from slots to methods, or a recipe.
    out : str or Path, optional
        Folder to write: weights, config, tokenizer. It appears whole or not at all.
    text : str, Path or None
        Text for calibration and healing: ``builtin``, named data, a file, or None. Not for a model in memory.
    exclude : sequence of str
        Evaluation data such as ``stsb:dev``; no text with one of its sentences is used.
    batches : iterable of dict of Tensor
        Model inputs (B, T) for calibration, for a model in memory.
    tokenizer : PreTrainedTokenizerBase, optional
        For a model in memory and methods that read the vocabulary.
    heal : int or dict
        Steps that train the installed parts to answer as the original did, or all options by name; see
        ``taut.healing.settings``. With ``out``, repeating the call continues an interrupted run.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own. Not for a model in memory.
    device : str
        Where the model is compressed, such as ``cuda``. Not for a model in memory.
    seed : int
        Seed of random starts.
    progress, healing : callable, optional
        Called with (done, total): of the compression, and of healing.

    Returns
    -------
    PreTrainedModel
        The compressed model.

    Raises
    ------
    TautError
        For wrong input, and for a recipe that does not fit. The model is then as before.

    Examples
    --------
    >>> model = taut.apply("minilm", {"embedding": {"method": "low_bit", "bits": 8}}, out="minilm-light")
    >>> taut.show("minilm-light")["recipe"]
    {'embedding': {'bits': 8, 'method': 'low_bit'}}
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
    """Train what a recipe installed in a model, in place, to answer as the original does.

    Parameters
    ----------
    model : PreTrainedModel
        The compressed model.
    original : PreTrainedModel
        The same model before compression.
    texts : iterable of str
        Texts to learn from, with their ``tokenizer``.
    steps : int
        Optimizer steps.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of ``texts``.
    batches : sequence of dict of Tensor
        Model inputs (B, T), instead of ``texts``.
    state : str or Path, optional
        Folder for checkpoints; repeating the call continues an interrupted run there.
    seed : int
        Seed of the order of texts and of adapters.
    progress : callable, optional
        Called with (steps done, steps).
    **choices
        batch, length, by, target, train, rank, learning_rate, warmup; see ``taut.healing.settings``.

    Returns
    -------
    dict
        What the model's config then says: settings, ``loss_first``, ``loss_last``, and whether the result was ``kept``.

    Raises
    ------
    TautError
        For a model that is not compressed, for wrong choices and for too little text.

    Examples
    --------
    >>> model, original = taut.load("minilm"), taut.load("minilm")
    >>> model = taut.apply(model, {"embedding": {"method": "low_rank", "rank": 96}})
    >>> texts = ["The cat sat on the mat.", "A boat crossed the river at night."] * 4
    >>> record = taut.heal(model, original, texts, steps=2, tokenizer=taut.vectors("minilm").tokenizer, batch=4)
    >>> record["steps"], record["kept"]
    (2, True)
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
    """Train a language model as a spec says, and write a complete folder with the training record.

    Repeating the call continues an interrupted run. Under torchrun or accelerate launch, processes share each batch.

    Parameters
    ----------
    spec : str, Path, dict or TrainSpec
        A YAML file or a mapping, from scratch or from a checkpoint, with or without a recipe; see
        ``taut.training.spec``.
    out : str or Path, optional
        Folder to write; default: ``runs/NAME`` of the spec's file.
    device : str
        Where to train, such as ``cuda``.
    threads : int, optional
        Processor threads; default: as they are.
    progress : callable, optional
        Called with the ``Moment`` after each step.

    Returns
    -------
    Trained
        ``status``, ``folder`` and ``record`` of the run.

    Raises
    ------
    TautError
        For a wrong spec, and for a folder that belongs to another run.

    Examples
    --------
    >>> model = "llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2"
    >>> spec = {"model": model, "tokenizer": "bytes", "text": "builtin", "length": 16, "budget": {"steps": 2}}
    >>> taut.train(spec | {"evaluate": {"tokens": 64}}, "tiny").status
    'done'
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
    """Write a copy of a model whose tokenizer puts an anchor token behind every sentence.

    Train the copy with the memory ``anchor`` and ``anchors: [TOKEN]``.

    Parameters
    ----------
    model : str or Path
        A folder, Hub id, ``minilm`` or scratch spec, with a tokenizer.
    out : str or Path
        Folder to write.
    token : str
        The token.
    after : sequence of str
        The strings that it follows.
    start : str
        First values of its row: ``mean`` of all rows, or the token whose row to copy.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    TautError
        For wrong input and for a model without a tokenizer.

    Examples
    --------
    >>> taut.anchor_token("minilm", "minilm-anchored", after=["."]).name
    'minilm-anchored'
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

    Each structured map is measured with 1 to 1,024 tokens; from then on the model uses the faster form. A copy costs
    memory, and its results differ in the last bits. For a folder, the result is stored in its config.json, and opening
    the folder on the same kind of processor makes the copies.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A compressed folder, or a compressed model in memory.
    threads : sequence of int
        Numbers of processor threads to measure; default: the present one.
    progress : callable, optional
        Called with (maps done, maps).

    Returns
    -------
    Tuning
        The measured times, and the ranges of tokens for which each map has a copy.

    Raises
    ------
    TautError
        For a model that is not compressed or has no such map.

    Examples
    --------
    >>> model = taut.load("minilm")
    >>> model = taut.apply(model, {"projection": {"method": "low_rank", "keep": 0.5}})
    >>> tuning = taut.tune(model)  # doctest: +SKIP
    """
    check_models(model)
    from taut.surgery.tune import tune as measure_maps

    return measure_maps(model, threads, progress=progress)


def undo(model: "PreTrainedModel") -> "PreTrainedModel":
    """Restore a model that was compressed in memory, bit for bit.

    Parameters
    ----------
    model : PreTrainedModel
        The model that ``taut.apply`` changed.

    Returns
    -------
    PreTrainedModel
        The same object.

    Raises
    ------
    TautError
        For a model that is not compressed, or was loaded in compressed form.

    Examples
    --------
    >>> model = taut.load("minilm")
    >>> before = model.embeddings.word_embeddings.weight.clone()
    >>> taut.undo(taut.apply(model, "table_int8")).embeddings.word_embeddings.weight.equal(before)
    True
    """
    from taut.surgery.apply import undo as take_out

    take_out(model)
    return model


def load(
    model: str | Path, *, dtype: "str | torch.dtype | None" = None, device: str = "cpu", seed: int = 0
) -> "PreTrainedModel":
    """Open a model, compressed or not, in the class that fits it.

    Parameters
    ----------
    model : str or Path
        A folder, Hub id, ``minilm``, or a scratch spec such as ``llama:hidden_size=64`` with random weights.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own.
    device : str
        Where the model is put, such as ``cuda``.
    seed : int
        Seed of the random weights of a scratch spec.

    Returns
    -------
    PreTrainedModel
        In evaluation mode.

    Raises
    ------
    TautError
        For wrong input, and for any missing or unexpected key.

    Examples
    --------
    >>> taut.load("minilm").config.hidden_size
    384
    """
    check_models(model)
    from taut.surgery.loading import open_model, resolve

    return open_model(resolve(model), read_dtype(dtype), device, seed)


def tokenizer(model: "str | Path | PreTrainedModel") -> "PreTrainedTokenizerBase":
    """Open the tokenizer of a model.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, Hub id or ``minilm``. For a model in memory: the tokenizer of the folder that it was opened from, else
        of the model that it was compressed from.

    Returns
    -------
    PreTrainedTokenizerBase
        As ``AutoTokenizer`` opens it.

    Raises
    ------
    TautError
        For wrong input, and if there is no tokenizer.

    Examples
    --------
    >>> taut.tokenizer("minilm")("Hello")["input_ids"]
    [101, 7592, 102]
    """
    check_models(model)
    from taut.surgery.loading import open_tokenizer, resolve

    if isinstance(model, str | Path):
        names = [str(model)]
    else:
        quantization = model.config.to_dict().get("quantization_config") or {}
        names = [name for name in (model.name_or_path, quantization.get("original")) if name]
    for name in names:
        if (opened := open_tokenizer(resolve(name))) is not None:
            return opened
    where = " or ".join(names) or f"this {type(model).__name__}, which was not opened from a folder"
    raise TautError(f"tokenizer: none beside {where}; open it with transformers' AutoTokenizer")


def show(folder: str | Path) -> dict[str, Any]:
    """Describe a model folder. Reads only headers, no tensor.

    Parameters
    ----------
    folder : str or Path
        A model folder, compressed or not.

    Returns
    -------
    dict
        Recipe, steps, original, tensors with shapes and dtypes, and bytes.

    Raises
    ------
    TautError
        For what is not a model folder.

    Examples
    --------
    >>> model = taut.apply("minilm", "table_int8", out="minilm-int8")
    >>> taut.show("minilm-int8")["original"]
    'minilm'
    """
    from taut.surgery.inspect import inspect

    return inspect(Path(folder))


def export(model: "str | Path | PreTrainedModel", out: str | Path) -> list[tuple[str, str]]:
    """Write a plain dense checkpoint, for tools without taut.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A compressed folder, or a compressed model in memory.
    out : str or Path
        Folder to write.

    Returns
    -------
    list of (str, str)
        Name and reason of each site that has no dense equivalent.

    Raises
    ------
    TautError
        For a model that is not compressed, and if ``out`` cannot be written.

    Examples
    --------
    >>> model = taut.apply("minilm", "table_int8")
    >>> taut.export(model, "minilm-dense")
    []
    """
    check_models(model)
    check_out(out)
    from taut.surgery.export import export as write

    if isinstance(model, str | Path):
        return write(load(model), out, Path(model))
    return write(model, out)


def footprint(model: "str | Path | PreTrainedModel") -> "Footprint":
    """Count the parameters and bytes of a model, slot by slot.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, Hub id, ``minilm``, scratch spec, or a model in memory.

    Returns
    -------
    Footprint
        ``parameters``, ``stored`` and ``resident`` bytes, of the model and of each of its ``slots``. Its ``str`` is one
        line to paste into an issue.

    Raises
    ------
    TautError
        For a model that cannot be opened.

    Examples
    --------
    >>> footprint = taut.footprint("minilm")
    >>> footprint.parameters, footprint.slots["embedding"].stored
    (22713216, 46881792)
    """
    check_models(model)
    from taut.studies.costs import footprint_of

    return footprint_of(load(model) if isinstance(model, str | Path) else model)
