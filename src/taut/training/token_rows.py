"""Rows of token ids from documents, and the inputs of a step from rows."""

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
"""Shares of the tokens that masked training predicts: shown as a random token, and unchanged (Devlin et al. 2019)."""


@dataclass(frozen=True)
class TokenRows:
    """Token ids (N, T) int32, and which of them are real, (N, T) bool (None: all).

    ``framed``: a special token stands at both ends of the real tokens and is never predicted. With ``streams`` (their
    number; 0: none) rows follow each other. Each stream reads its share of the rows in order, and ``first`` (N,) bool
    marks the rows that begin a text.
    """

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
        """Rows per stream. Remaining rows are not read."""
        return len(self) // self.streams

    def follows(self, index: int) -> bool:
        """Whether this row continues the row before it."""
        return self.first is not None and 0 < index < len(self) and not self.first[index]


def token_rows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, spec: TrainSpec, masked: bool
) -> TokenRows:
    """Make the rows of a spec; see ``data.token_rows.document_rows``.

    Documents are packed, or each of their paragraphs is a row, cut or padded. With carried memory and without packing,
    each document begins a row and has as many rows as it needs.
    """
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
    """Select rows that hold about ``tokens`` ids, at least one row.

    They are spread evenly; with streams, they are the first rows of each stream.
    """
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
    """How masked training hides a ``share`` of a row: shown as ``token``, as any of ``vocabulary``, or unchanged."""

    share: float
    token: int
    vocabulary: int


class TrainingSet(Dataset):
    """``positions`` rows in the order of training. Every epoch has all rows once, in its own order.

    The item at a position depends only on its number and the seed. ``batch_of`` says which batch of ``batch`` rows a
    step reads. Rows of streams are in the order of the text, and their ``restart`` says whether the stream restarts.
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
        item = example(self.rows, row, self.masking, epoch_seed(self.seed, number))
        if self.rows.streams:
            continues = step > 0 and self._row((self.batch_of(step - 1)) * self.batch + place) == row - 1
            item["restart"] = torch.tensor(not (continues and self.rows.follows(row)))
        return item

    def _row(self, number: int) -> int:
        """The row that has this number in the order of training."""
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
    """One row as model inputs: ``input_ids`` and ``labels`` (T,) int64, and ``attention_mask`` if rows are padded.

    A label stands at the position that predicts it. ``draw`` is the seed of the choice of hidden tokens. In a stream,
    the last position predicts the first token of the next row.
    """
    ids = rows.ids[index].long()
    real = torch.ones_like(ids, dtype=torch.bool) if rows.real is None else rows.real[index]
    if masking is None:
        labels = torch.full_like(ids, IGNORED)
        labels[:-1] = torch.where(real[1:], ids[1:], IGNORED)
        if rows.follows(index + 1):
            labels[-1] = rows.ids[index + 1, 0]
    else:
        ids, labels = _hidden(ids, real, rows.framed, masking, draw)
    item = {"input_ids": ids, "labels": labels}
    return item if rows.real is None else item | {"attention_mask": real.long()}


def _hidden(ids: Tensor, real: Tensor, framed: bool, masking: Masking, draw: int) -> tuple[Tensor, Tensor]:
    """Hide tokens: equally many in all rows of one length, so that rows weigh the same; at least one."""
    generator = torch.Generator().manual_seed(draw)
    width = int(real.sum())
    first, after = (1, width - 1) if framed else (0, width)
    count = max(1, math.floor(masking.share * (after - first)))
    hidden = first + torch.randperm(after - first, generator=generator)[:count]
    labels = torch.full_like(ids, IGNORED)
    labels[hidden] = ids[hidden]
    dice = torch.rand(count, generator=generator)
    others = torch.randint(masking.vocabulary, (count,), generator=generator)
    shown = torch.where(dice < RANDOM, others, torch.where(dice < RANDOM + KEPT, ids[hidden], masking.token))
    ids = ids.clone()
    ids[hidden] = shown
    return ids, labels
