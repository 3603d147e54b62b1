"""Evaluate models: scores, costs, studies, reports, contracts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from taut.api.sources import check_models, read_dtype, use_threads
from taut.core.progress import Progress
from taut.core.record import Measurements, Scores
from taut.core.registry import METHODS, check_task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from taut.evaluation.effective_context import Contexts
    from taut.studies.ledger import Ledger
    from taut.studies.runner import Outcome


def evaluate(
    model: "str | Path | PreTrainedModel",
    task: str,
    *,
    data: str | Path | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    reference: "str | Path | PreTrainedModel | None" = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
    progress: Progress | None = None,
    **options: Any,
) -> Scores:
    """Score a model on one task, beside the task's shortcut baselines.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, Hub id, ``minilm``, scratch spec, or a model in memory.
    task : str
        sts, docs_retrieval, agreement, perplexity, classify, ...
    data : str or Path, optional
        A file or a named data set; default: the task's own.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a model in memory.
    reference : str, Path or PreTrainedModel, optional
        The original model, for tasks that compare with it.
    seed : int
        Seed of the task's samples, and of a scratch spec.
    device : str
        Where to run, such as ``cuda``.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own.
    progress : callable, optional
        Called with (done, total).
    **options
        Further options of the task: the fields of ``Options`` in its file in ``taut.evaluation.tasks``.

    Returns
    -------
    Scores
        A ``Score`` for each metric: value with its samples, baselines, and what data it holds for.

    Raises
    ------
    TautError
        For an unknown task or option, and for a model that cannot do the task.

    Examples
    --------
    >>> model = taut.load("llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2")
    >>> tokenizer = taut.vectors("minilm").tokenizer
    >>> scores = taut.evaluate(model, "perplexity", tokenizer=tokenizer, limit=500, max_length=32)
    >>> [score.metric for score in scores]
    ['perplexity_per_token', 'bits_per_byte']
    """
    check_task({"name": task, **options})
    check_models(model, reference)
    dtype = read_dtype(dtype)
    from taut.evaluation.evaluate import evaluate as run

    return run(
        model,
        task,
        options=options if data is None else {**options, "data": str(data)},
        tokenizer=tokenizer,
        reference=reference,
        seed=seed,
        device=device,
        dtype=dtype,
        progress=progress,
    )


def context(
    models: "Sequence[str | Path | PreTrainedModel] | str | Path | PreTrainedModel",
    data: str | Path = "python_topics",
    *,
    split: str | None = None,
    limit: int | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    shortest: int = 64,
    step: int = 64,
    longest: int = 512,
    hardest: float = 0.1,
    threshold: float = 0.01,
    positions: int = 1000,
    batch_size: int = 32,
    cached: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
    progress: Progress | None = None,
) -> "Contexts":
    """Measure how much of their context models use: relative effective context length (Dai et al. 2019).

    Measures the losses of the same tokens after exactly ``shortest``, ``shortest + step``, ... ``longest`` tokens of
    context. A model's context grows as long as each step lowers its perplexity by the share ``threshold`` or more.

    Parameters
    ----------
    models : model or sequence of models
        Folders, Hub ids or decoders in memory, all with one tokenizer.
    data : str or Path
        A file or a named text.
    split : str, optional
        Split of a named data set; default: the task's own.
    limit : int, optional
        Most texts to read.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of models in memory.
    shortest, step, longest : int
        Contexts to measure, in tokens.
    hardest : float
        Share of the tokens that count: those that the whole group finds hardest at the shorter context.
    threshold : float
        Share by which a step must lower the perplexity.
    positions : int
        Tokens to predict, evenly spread over the text.
    batch_size : int
        Windows run at once.
    cached : int, optional
        Read with the cache, this many tokens at a time; default: without.
    seed : int
        Seed of the interval's resampling, and of scratch specs.
    device : str
        Where to run, such as ``cuda``.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folders' own.
    progress : callable, optional
        Called with (done, total).

    Returns
    -------
    Contexts
        ``results`` with the context of each model in tokens, and ``losses`` in nats per token at each of ``contexts``.

    Raises
    ------
    TautError
        For wrong input, models that are no decoders, and tokenizers that differ.

    Examples
    --------
    >>> model = taut.load("llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2")
    >>> tokenizer = taut.vectors("minilm").tokenizer
    >>> taut.context(model, tokenizer=tokenizer, shortest=4, step=4, longest=12, positions=20).contexts
    (4, 8, 12)
    """
    group = cast("Sequence[str | Path | PreTrainedModel]", models if isinstance(models, list | tuple) else [models])
    check_models(*group)
    dtype = read_dtype(dtype)
    from taut.evaluation.effective_context import context as run

    return run(
        group,
        str(data),
        split=split,
        limit=limit,
        tokenizer=tokenizer,
        shortest=shortest,
        step=step,
        longest=longest,
        hardest=hardest,
        threshold=threshold,
        positions=positions,
        batch_size=batch_size,
        cached=cached,
        seed=seed,
        device=device,
        dtype=dtype,
        progress=progress,
    )


def measure(
    model: "str | Path | PreTrainedModel",
    *,
    against: "str | Path | PreTrainedModel | None" = None,
    batch: int = 1,
    length: int = 128,
    decode: int = 0,
    repeats: int = 20,
    threads: int | None = None,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Measurements:
    """Measure the size, FLOPs, latency, memory and energy of a model.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, Hub id, ``minilm``, scratch spec, or a model in memory.
    against : str, Path or PreTrainedModel, optional
        Another model, for latency ratios; the two take turns.
    batch, length : int
        Sequences at once, and tokens of each.
    decode : int
        New tokens to time one by one; 0 for none.
    repeats : int
        Samples of each latency; an interval needs at least 6.
    threads : int, optional
        Processor threads; default: as they are.
    device : str
        Where to run, such as ``cuda``.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own.
    seed : int
        Seed of the random weights of a scratch spec.
    progress : callable, optional
        Called with the name of each stage.

    Returns
    -------
    Measurements
        A ``Quantity`` by name: value with unit, samples and how it was measured. What cannot be measured is None.

    Raises
    ------
    TautError
        For wrong input.

    Examples
    --------
    >>> model = "llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2"
    >>> costs = taut.measure(model, length=16, repeats=2)  # doctest: +SKIP
    >>> costs["cache_bytes_per_token"].value  # doctest: +SKIP
    128.0
    """
    check_models(model, against)
    dtype = read_dtype(dtype)
    from taut.studies.costs import measure as run

    options = {"batch": batch, "length": length, "decode": decode, "repeats": repeats, "threads": threads}
    report = progress or (lambda stage: None)
    return run(model, against, options=options, device=device, dtype=dtype, seed=seed, report=report)


def compare(
    study: str | Path,
    recipes: Sequence[str] = (),
    *,
    ledger: str | Path | None = None,
    report: str | Path | None = None,
    figures: str | Path | None = None,
    only: Sequence[str] = (),
    name: str | None = None,
    tasks: Sequence[str | dict[str, Any]] | None = None,
    seeds: Sequence[int] | None = None,
    measure: dict[str, Any] | None = None,
    limits: dict[str, Any] | None = None,
    text: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> "Outcome":
    """Run the trials of a study that the ledger does not hold yet, and draw the report.

    Parameters
    ----------
    study : str or Path
        The YAML file of a study, or a model to compare ``recipes`` on.
    recipes : sequence of str
        Recipe files, names, or a shipped set such as ``light``; only with a model.
    ledger : str or Path, optional
        Folder of records; default: ``runs/NAME``.
    report : str or Path, optional
        Page to write.
    figures : str or Path, optional
        Folder for the figures as PNG files.
    only : sequence of str
        Recipes to run; ``dense`` and ``identity`` always run.
    name, tasks, seeds, measure, limits, text, dtype : optional
        Fields of a study, as in its YAML file (see ``taut.studies.study``); only with a model.
    device : str, optional
        Where to run, such as ``cuda``; default: the study's own.
    threads : int, optional
        Processor threads; default: the study's own.

    Returns
    -------
    Outcome
        ``rows``, the comparison, and which trials ran, failed or were skipped.

    Raises
    ------
    TautError
        For wrong input, before anything runs.

    Examples
    --------
    >>> model = "llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2"
    >>> outcome = taut.compare(model, ["table_int8"], tasks=[], measure={}, ledger="records")
    >>> [row.recipe_name for row in outcome.rows]
    ['dense', 'identity', 'table_int8']
    """
    from taut.studies.ledger import Ledger
    from taut.studies.study import Study

    fields = {"name": name, "tasks": tasks, "seeds": seeds, "measure": measure, "limits": limits, "text": text}
    options = {field: value for field, value in {**fields, "dtype": dtype}.items() if value is not None}
    chosen = Study.read(study, recipes, **options).narrowed(only, device, threads)
    records = Ledger(ledger or Path("runs") / chosen.name)
    check_models(*(spec.model for spec in chosen.trials() if not records.has(spec.id)))
    from taut.studies import runner

    use_threads(threads)
    outcome = runner.compare(chosen, records)
    if not outcome.interrupted and (report is not None or figures is not None):
        draw(outcome.ledger, report, figures=figures)
    return outcome


def report(
    ledger: "Ledger | str | Path",
    out: str | Path | None,
    *,
    figures: str | Path | None = None,
    csv: str | Path | None = None,
) -> Path | None:
    """Draw the report of a ledger. Writes only what is asked for.

    Parameters
    ----------
    ledger : Ledger, str or Path
        The records, or their folder.
    out : str, Path or None
        Page to write, self-contained.
    figures : str or Path, optional
        Folder for the figures as PNG files.
    csv : str or Path, optional
        File for the same numbers unrounded, a line for each score and cost of each recipe.

    Returns
    -------
    Path or None
        The page.

    Raises
    ------
    TautError
        If the ledger is empty or a file cannot be written.

    Examples
    --------
    >>> model = "llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2"
    >>> outcome = taut.compare(model, ["table_int8"], tasks=[], measure={}, ledger="records")
    >>> taut.report("records", "report.html").name
    'report.html'
    """
    from taut.studies.ledger import Ledger

    records = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
    records.check_not_empty()
    from taut.reporting.page import write

    return write(records, out, figures, csv)


draw = report
"""``report`` under a second name, because the parameter ``report`` of ``compare`` hides it there."""


def check(
    method: str, families: Sequence[str] = (), knobs: dict[str, Any] | None = None, *, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Run the contract suite on one method.

    Parameters
    ----------
    method : str
        Its id, or its last part if no other method has that name.
    families : sequence of str
        Tiny model families to try; default: four representatives.
    knobs : dict, optional
        Knobs instead of the method's own test row.
    device : str
        Where to run, such as ``cuda``.

    Returns
    -------
    list of dict
        ``check``, ``case``, ``status`` (passed, skipped or failed) and ``reason`` of each check on each case.

    Raises
    ------
    TautError
        For an unknown method or family, and for a missing device.

    Examples
    --------
    >>> rows = taut.check("embedding.low_bit", families=["bert"])  # doctest: +SKIP
    """
    key = METHODS.resolve(method)
    METHODS.check_names(key, knobs or (), "check")
    from taut.contract.suite import run

    return run(key, tuple(families), knobs, device)
