"""Judging models: scores, costs, studies, reports, contracts."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.api.sources import read_dtype, use_threads
from taut.core.progress import Progress
from taut.core.record import Quantity, Score

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from taut.evaluation.effective_context import Contexts
    from taut.studies.ledger import Ledger
    from taut.studies.runner import Outcome


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
    from taut.evaluation.evaluate import evaluate as run

    return run(
        model,
        task,
        options=options if data is None else {**options, "data": str(data)},
        tokenizer=tokenizer,
        reference=reference,
        seed=seed,
        device=device,
        dtype=read_dtype(dtype),
        progress=progress,
    )


def context(
    models: "Sequence[str | Path | PreTrainedModel] | str | Path | PreTrainedModel",
    data: str | Path = "python_topics",
    *,
    tokenizer: Any = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
    progress: Progress | None = None,
    **options: Any,
) -> "Contexts":
    """How much of their context the models of a group use: relative effective context length (Dai et al. 2019).

    Losses of the same tokens of ``data``, behind exactly ``shortest``, ``shortest + step``, ... ``longest`` tokens. A
    model goes up step by step as long as the share ``hardest`` of the tokens, those that the whole group finds hardest
    at the shorter context, gains ``threshold`` of its perplexity. All models must share a tokenizer, which models in
    memory need as ``tokenizer``. Further options: ``positions``, ``batch_size``, ``cached``, ``split``, ``limit``.
    Raises TautError for wrong input.
    """
    from taut.evaluation.effective_context import context as run

    single = not isinstance(models, list | tuple)
    chosen = {"tokenizer": tokenizer, "seed": seed, "device": device, "dtype": read_dtype(dtype), "progress": progress}
    return run([models] if single else models, str(data), **chosen, **options)


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
    from taut.studies.costs import measure as run

    chosen = {"device": device, "dtype": read_dtype(dtype), "seed": seed}
    return run(model, against, options=options, **chosen, **({} if progress is None else {"report": progress}))


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
    from taut.studies import runner

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


def check(
    method: str, families: Sequence[str] = (), knobs: dict[str, Any] | None = None, *, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Run the contract suite on one method; a row per check and case: ``passed``, ``skipped`` or ``failed``, why."""
    from taut.contract.suite import run

    return run(method, tuple(families), knobs, device)
