"""Measures how a language model's loss falls with more context: whether it uses distant tokens."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.record import Score
from taut.evaluation._encode import usable_length
from taut.evaluation._language import CACHED, causal_windows, logits, surprise, tokenize
from taut.evaluation.task import Task, TaskOptions, writes_text

FIRST = 16
"""The first range ends before this many tokens of context; each further range ends at twice the context."""


class LossByPositionOptions(TaskOptions):
    """Options of loss_by_position."""

    data: str = Field("python_topics", description="running text")
    limit: int | None = Field(100_000, ge=1, description="number of characters, from the start of the text")
    batch_size: int = Field(8, ge=1, le=4096, description="windows run at once; does not change the score")
    max_length: int = Field(512, ge=2 * FIRST, description="tokens per window; the context starts at its first one")
    cached: int | None = Field(None, ge=1, description=CACHED)


class LossByPosition(Task):
    """The mean loss of each range of context lengths, and by how much the last doubling of context lowers it.

    The text is cut into adjacent windows. The model reads each from its first token on, so a token's place is the
    length of its context.
    """

    id = "loss_by_position"
    summary = "loss of tokens with much and with little context: whether the model uses distant tokens"
    Options: ClassVar[type[TaskOptions]] = LossByPositionOptions

    def fits(self, model: PreTrainedModel) -> str | None:
        return writes_text(model)

    def evaluated(self) -> data.Data:
        return data.paragraphs(self.options.data, self.options.split, self.options.limit)

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        source = data.text(self.options.data, self.options.split, self.options.limit)
        tokens = tokenize(tokenizer, source.rows[0][0])
        length = usable_length(model, tokenizer, self.options.max_length)
        opening = int(tokenizer.bos_token_id is not None)
        windows = causal_windows(tokens, tokenizer.bos_token_id, length, length - opening)
        rows = [window.ids for window in windows if len(window.ids) == length]
        ranges = places(length)
        if len(rows) < 2 or len(ranges) < 2:
            raise TautError(
                f"task {self.id}: {len(tokens.ids)} tokens in windows of {length} give {len(rows)} windows and "
                f"{len(ranges)} ranges of places; expected at least 2 of each: change max_length, or use a longer text"
            )
        losses = self._losses(model, rows, progress)
        facts = source.facts(len(rows))
        how = f"{len(rows)} adjacent windows of {length} tokens, {'BOS first' if opening else 'no BOS'}"
        how += f", {self.options.cached} at a time through the cache" if self.options.cached else ""
        scores = [
            self.score(
                f"loss_at_{first}_to_{last - 1}",
                "nats per token",
                f"{how}; tokens with {first} to {last - 1} tokens before them; samples: the mean of each window",
                losses[:, first - 1 : last - 1].mean(1).tolist(),
                "lower",
                facts,
            )
            for first, last in ranges
        ]
        before, after = (losses[:, first - 1 : last - 1].mean(1) for first, last in ranges[-2:])
        scores.append(
            self.score(
                "gain_of_last_doubling",
                "nats per token",
                f"{how}; loss of the second-to-last range minus loss of the last",
                (before - after).tolist(),
                "higher",
                facts,
            )
        )
        return tuple(scores)

    @torch.inference_mode()
    def _losses(self, model: PreTrainedModel, rows: Sequence[Sequence[int]], progress: Progress) -> torch.Tensor:
        """(N, length - 1) float64 nats of every token except the first of each window."""
        losses: list[torch.Tensor] = []
        size = self.options.batch_size
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            for scores, ids in zip(logits(model, batch, self.options.cached), batch, strict=True):
                losses.append(surprise(scores[:-1], ids[1:]))
            progress(len(losses), len(rows))
        return torch.stack(losses)


def places(length: int) -> list[tuple[int, int]]:
    """Ranges of places (first, last exclusive) in a window: 1 to 15, 16 to 31, 32 to 63, ..., only complete ones."""
    ends = [FIRST]
    while 2 * ends[-1] <= length:
        ends.append(2 * ends[-1])
    return list(zip([1, *ends[:-1]], ends, strict=True))
