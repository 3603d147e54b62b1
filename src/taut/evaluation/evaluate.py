"""One task on one model, by name or in memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.record import Scores
from taut.evaluation.task import parse_task
from taut.surgery.loading import open_model, open_tokenizer, resolve


def evaluate(
    model: str | Path | PreTrainedModel,
    task: str,
    *,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: str | Path | PreTrainedModel | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Scores:
    """The scores of ``model`` on ``task``; see ``taut.evaluate``."""
    chosen = parse_task({"name": task, **options})
    if isinstance(model, str | Path):
        source = resolve(model)
        tokenizer = tokenizer or open_tokenizer(source)
        if tokenizer is None:
            raise TautError(f"{source.name}: no tokenizer there, and a task needs one")
        model = open_model(source, dtype, device, seed)
    if tokenizer is None:
        raise TautError("evaluate: a model in memory needs its tokenizer=")
    if isinstance(reference, str | Path):
        reference = open_model(resolve(reference), dtype, device, seed)
    return Scores(chosen.evaluate(model, tokenizer, seed=seed, progress=progress, reference=reference))
