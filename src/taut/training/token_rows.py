"""From documents to rows of token ids, and from rows to what a step reads."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from taut.core.seeds import epoch_seed
from taut.data.token_rows import document_rows
from taut.healing.losses import IGNORED
from taut.training.corpus import pieces_of
from taut.training.spec import TrainSpec

RANDOM, KEPT = 0.1, 0.1
"""Of the tokens that masked training asks for: shares shown as a random one, and as they are (Devlin et al. 2019)."""


@dataclass(frozen=True)
class TokenRows:
    """Token ids (N, T) int32, and which of them are real, (N, T) bool (None: all). ``framed``: a special token stands
    at both ends of what is real, and is never asked for. With ``lanes`` rows follow each other: each of so many lanes
    reads its share of them in order, and ``first`` (N,) bool are those that begin a text."""

    ids: Tensor
    real: Tensor | None = None
    framed: bool = False
    streams: int = 0
    first: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return self.ids.numel() if self.real is None else int(self.real.sum())

    @property
    def steps(self) -> int:
        """Rows of a lane; what is left over is not read."""
        return len(self) // self.streams

    def follows(self, index: int) -> bool:
        """Whether this row goes on where the one before it ended."""
        return self.first is not None and 0 < index < len(self) and not self.first[index]


def token_rows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, spec: TrainSpec, masked: bool
) -> TokenRows:
    """The rows that a spec trains on. Documents are packed, or each of their paragraphs is a row, cut or padded. With
    carried memory each document begins a row and has as many as it needs. See ``data.token_rows.document_rows``."""
    framed = masked and tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None
    texts = list(documents) if spec.pack or spec.carry_memory else pieces_of(documents)
    choices = {"pack": spec.pack, "whole": spec.carry_memory, "framed": framed}
    rows = document_rows(tokenizer, texts, spec.length, **choices)
    padding = tokenizer.pad_token_id or 0
    padded = [[*row, *[padding] * (spec.length - len(row))] for row, _ in rows]
    ids = torch.tensor(padded, dtype=torch.int32).reshape(-1, spec.length)
    streams = spec.batch if spec.carry_memory else 0
    first = torch.tensor([first for _, first in rows]) if spec.carry_memory else None
    if spec.pack or not rows:
        return TokenRows(ids, None, framed, streams, first)
    widths = torch.tensor([len(row) for row, _ in rows])
    return TokenRows(ids, torch.arange(spec.length) < widths[:, None], framed, streams, first)


def spread(rows: TokenRows, tokens: int) -> TokenRows:
    """Of many rows as many as hold about ``tokens`` ids, evenly spread; at least one. Of lanes, what stands at the
    beginning of each."""
    count = min(len(rows), max(1, tokens // rows.ids.shape[1]))
    if not rows.streams:
        chosen = torch.linspace(0, len(rows) - 1, count).round().long()
        return TokenRows(rows.ids[chosen], None if rows.real is None else rows.real[chosen], rows.framed)
    streams = min(len(rows), rows.streams)
    starts = torch.arange(streams) * (len(rows) // streams)
    steps = torch.arange(min(len(rows) // streams, math.ceil(count / streams)))
    chosen = (starts[:, None] + steps).flatten()
    first = rows.first[chosen] | (steps == 0).repeat(streams)
    return TokenRows(rows.ids[chosen], None if rows.real is None else rows.real[chosen], rows.framed, streams, first)


@dataclass(frozen=True)
class Masking:
    """How masked training hides tokens: ``share`` of a row, shown as ``token``, as any of ``vocabulary``, or as is."""

    share: float
    token: int
    vocabulary: int


class TrainingSet(Dataset):
    """Rows in the order of training, ``positions`` of them: every epoch has all rows once, in an order of its own.

    What stands at a position follows from its number and the seed alone. ``batch_of`` says which batch of ``batch``
    rows a step reads. Rows in lanes have one order, that of the text, and each says whether its lane begins anew:
    ``fresh``.
    """

    def __init__(
        self,
        rows: TokenRows,
        positions: int,
        batch: int,
        seed: int,
        masking: Masking | None = None,
        batch_of: Callable[[int], int] = lambda step: step,
    ) -> None:
        self.rows, self.positions, self.batch, self.seed = rows, positions, batch, seed
        self.masking, self.batch_of = masking, batch_of
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return self.positions

    def tokens(self, steps: int) -> int:
        """Real tokens that the first ``steps`` steps read."""
        if self.rows.real is None:
            return steps * self.batch * self.rows.ids.shape[1]
        widths = self.rows.real.sum(1)
        numbers = (self.batch_of(step) * self.batch + row for step in range(steps) for row in range(self.batch))
        return sum(int(widths[self._row(number)]) for number in numbers)

    def __getitem__(self, position: int) -> dict[str, Tensor]:
        step, place = divmod(position, self.batch)
        number = self.batch_of(step) * self.batch + place
        row = self._row(number)
        found = example(self.rows, row, self.masking, epoch_seed(self.seed, number))
        if self.rows.streams:
            goes_on = step > 0 and self._row((self.batch_of(step - 1)) * self.batch + place) == row - 1
            found["restart"] = torch.tensor(not (goes_on and self.rows.follows(row)))
        return found

    def _row(self, number: int) -> int:
        """Which row has this number in the order of training."""
        if self.rows.streams:
            batch, stream = divmod(number, self.batch)
            return stream * self.rows.steps + batch % self.rows.steps
        epoch, index = divmod(number, len(self.rows))
        return int(self._ordered(epoch)[index])

    def _ordered(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(epoch_seed(self.seed, epoch))
            self._order = epoch, torch.randperm(len(self.rows), generator=generator)
        return self._order[1]


def example(rows: TokenRows, index: int, masking: Masking | None, draw: int) -> dict[str, Tensor]:
    """One row as the model reads it: ``input_ids`` and ``labels`` (T,) int64, each label at the position that predicts
    it; ``attention_mask`` where rows are padded. The number ``draw`` decides what is hidden. In lanes the last position
    predicts the first token of the next row."""
    ids = rows.ids[index].long()
    real = torch.ones_like(ids, dtype=torch.bool) if rows.real is None else rows.real[index]
    if masking is None:
        labels = torch.full_like(ids, IGNORED)
        labels[:-1] = torch.where(real[1:], ids[1:], IGNORED)
        if rows.follows(index + 1):
            labels[-1] = rows.ids[index + 1, 0]
    else:
        ids, labels = _hidden(ids, real, rows.framed, masking, draw)
    found = {"input_ids": ids, "labels": labels}
    return found if rows.real is None else found | {"attention_mask": real.long()}


def _hidden(ids: Tensor, real: Tensor, framed: bool, masking: Masking, draw: int) -> tuple[Tensor, Tensor]:
    """As many tokens in every row of a length, so that rows weigh the same; at least one."""
    generator = torch.Generator().manual_seed(draw)
    width = int(real.sum())
    first, after = (1, width - 1) if framed else (0, width)
    count = max(1, math.floor(masking.share * (after - first)))
    asked = first + torch.randperm(after - first, generator=generator)[:count]
    labels = torch.full_like(ids, IGNORED)
    labels[asked] = ids[asked]
    dice = torch.rand(count, generator=generator)
    others = torch.randint(masking.vocabulary, (count,), generator=generator)
    shown = torch.where(dice < RANDOM, others, torch.where(dice < RANDOM + KEPT, ids[asked], masking.token))
    ids = ids.clone()
    ids[asked] = shown
    return ids, labels
