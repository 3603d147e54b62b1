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

    ``data`` is a file or a named data set; default: the task's own. A model in memory needs its ``tokenizer``.
    ``reference`` is the original model, for tasks that compare with it. ``options`` are further options of the task.
    Raises TautError for wrong input.
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

    Measures the losses of the same tokens of ``data`` after exactly ``shortest``, ``shortest + step``, ... ``longest``
    tokens of context. The context of a model grows step by step as long as each step lowers its perplexity by the share
    ``threshold`` or more. Only the share ``hardest`` of the tokens counts: those that the whole group finds hardest at
    the shorter context. All models must share a tokenizer; for models in memory, pass it as ``tokenizer``. Further
    options: ``positions``, ``batch_size``, ``cached``, ``split``, ``limit``. Raises TautError for wrong input.
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

    With ``against``, also gives interleaved latency ratios to that model. ``options``: ``batch``, ``length``,
    ``decode``, ``repeats``, ``threads``. Raises TautError for wrong input.
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

    ``study`` is a YAML file, or a MODEL with ``recipes`` (files, names or a shipped set such as ``light``). For a
    MODEL, ``options`` are further fields of a study (tasks, seeds, measure, limits, dtype). ``only`` names the recipes
    to run; ``dense`` and ``identity`` always run. ``ledger`` is a folder, ``runs/NAME`` by default. ``report`` is the
    page to write, ``figures`` a folder for PNG files. Raises TautError for wrong input, before anything runs.
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
    """Draw the report of a ledger: one self-contained page ``out``, and PNG files in the folder ``figures``.

    ``csv`` is a file for the same numbers unrounded, a line for each score and cost of each recipe. Writes only what is
    given. Raises TautError if the ledger is empty or a file cannot be written.
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
    """Run the contract suite on one method, given by its id or by a name that no other method has.

    Returns a row for each check and case: ``passed``, ``skipped`` or ``failed``, with the reason. ``families`` are the
    tiny model families to try; default: four representatives. ``knobs`` replaces the method's own test row. Raises
    TautError for an unknown method or family, and for a missing device.
    """
    key = METHODS.resolve(method)
    METHODS.check_names(key, knobs or (), "check")
    from taut.contract.suite import run

    return run(key, tuple(families), knobs, device)
