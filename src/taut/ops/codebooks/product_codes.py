"""Tables of codes: a row is cut into subvectors, and each is the sum of ``stages`` centroids given by small codes.

A row's codes take one byte each. With 16 centroids, two codes share a byte, the earlier subvector in the low half.
Lengths of rows are bytes as well, on a logarithmic scale.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.ops.codebooks.gather import read_rows

ROWS_AT_ONCE = 512
"""Rows looked up at a time on a CPU, so that their places stay in the cache."""
SCORED_AT_ONCE = 4096
"""Rows scored at a time: bounds the memory for their places."""
TOKENS_AT_ONCE = 16
"""Tokens scored at a time, so that their products with all centroids stay in the cache."""
STEPS_PER_OCTAVE, LENGTH_ONE = 16, 239
"""A length is 2^((code - LENGTH_ONE) / STEPS_PER_OCTAVE), within 2.2 %, from 2^-14.9 to 2; code 0 is length zero."""


@dataclass(frozen=True)
class CodeLayout:
    """Rows of ``width`` D numbers in subvectors of ``subvector`` w, a divisor of D; ``centroids`` C is 256 or 16.

    ``shared``: one codebook for all subvectors of a stage, else each has its own."""

    width: int
    subvector: int
    stages: int
    centroids: int
    shared: bool

    @property
    def positions(self) -> int:
        """P, the subvectors of a row."""
        return self.width // self.subvector

    @property
    def books(self) -> int:
        """How many codebooks a stage has."""
        return 1 if self.shared else self.positions

    @property
    def stage_bytes(self) -> int:
        """Bytes of a row's codes in one stage."""
        return self.positions if self.centroids == 256 else (self.positions + 1) // 2

    def pack(self, codes: Tensor) -> Tensor:
        """(N, S, P) integer codes -> (N, S, ``stage_bytes``) uint8."""
        codes = codes.to(torch.uint8)
        if self.centroids == 256:
            return codes
        codes = F.pad(codes, (0, self.positions % 2))
        return codes[..., 0::2] | codes[..., 1::2] << 4

    def starts(self, device: torch.device) -> Tensor:
        """Where the codebook of each stage and subvector starts among the rows of all codebooks: (S, P or 1) int32."""
        book = torch.arange(self.stages, device=device)[:, None] * self.books
        if not self.shared:
            book = book + torch.arange(self.positions, device=device)
        return (book * self.centroids).int()

    def places(self, packed: Tensor, starts: Tensor) -> Tensor:
        """(N, S, ``stage_bytes``) uint8 -> (N, S, P) int32: rows of all codebooks (S, books, C, w) as one table."""
        if self.centroids != 256:
            packed = torch.stack((packed & 15, packed >> 4), -1).flatten(2)[..., : self.positions]
        return packed.int().add_(starts)

    def codes(self, packed: Tensor) -> Tensor:
        """(N, S, ``stage_bytes``) uint8 -> (N, S, P) int64 codes."""
        return self.places(packed, self.starts(packed.device)).long() % self.centroids


def lookup(packed: Tensor, ids: Tensor, books: Tensor, layout: CodeLayout, lengths: Tensor | None = None) -> Tensor:
    """Rows of a table of codes: ids (n,) -> (n, D) in the dtype of ``books`` (S, books, C, w), times ``lengths`` (n,).

    Differentiable in ``books`` and ``lengths``; keeps only the ids for the backward pass. Extra memory O(n). Raises
    IndexError for an id outside the table (on CUDA the device asserts).
    """
    if packed.device.type != "cpu" or torch.compiler.is_compiling():
        places = layout.places(packed.index_select(0, ids), layout.starts(packed.device)).view(-1)
        rows = books.reshape(-1, layout.subvector).index_select(0, places)
        rows = rows.view(-1, layout.stages, layout.width).sum(1)
        return rows if lengths is None else rows * lengths[:, None]
    return _Lookup.apply(packed, ids, books, layout, lengths)


class _Lookup(torch.autograd.Function):
    """Works in pieces, so that only the result itself takes memory O(result)."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, ids: Tensor, books: Tensor, layout: CodeLayout, lengths: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(packed, ids, books, lengths)
        ctx.layout = layout
        flat, starts = books.reshape(-1, layout.subvector), layout.starts(packed.device)
        out = books.new_empty(ids.numel(), layout.width)
        for start in range(0, ids.numel(), ROWS_AT_ONCE):
            piece = slice(start, start + ROWS_AT_ONCE)
            _read(layout.places(packed.index_select(0, ids[piece]), starts), flat, out[piece])
            if lengths is not None:
                out[piece].mul_(lengths[piece, None])
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        packed, ids, books, lengths = ctx.saved_tensors
        layout = ctx.layout
        flat, starts = books.reshape(-1, layout.subvector), layout.starts(packed.device)
        by_book = torch.zeros_like(flat) if ctx.needs_input_grad[2] else None
        by_length = torch.empty_like(lengths) if ctx.needs_input_grad[4] else None
        for start in range(0, ids.numel(), ROWS_AT_ONCE):
            piece = slice(start, start + ROWS_AT_ONCE)
            places, part = layout.places(packed.index_select(0, ids[piece]), starts), gradient[piece]
            if by_length is not None:
                rows = _read(places, flat, torch.empty_like(part, memory_format=torch.contiguous_format))
                by_length[piece] = (rows * part).sum(1)
            if by_book is not None:
                scaled = part if lengths is None else part * lengths[piece, None]
                for stage in range(layout.stages):
                    # With 32-bit places, torch makes one call per row, which is six times slower.
                    by_book.index_add_(0, places[:, stage].reshape(-1).long(), scaled.reshape(-1, layout.subvector))
        return None, None, None if by_book is None else by_book.view_as(books), None, by_length


def _read(places: Tensor, flat: Tensor, out: Tensor) -> Tensor:
    """The centroids at the places (n, S, P), summed over stages, written into ``out`` (n, D)."""
    read_rows(places[:, 0].reshape(-1), flat, out.view(-1, flat.shape[1]))
    for stage in range(1, places.shape[1]):
        out += read_rows(places[:, stage].reshape(-1), flat).view_as(out)
    return out


def scores(hidden: Tensor, packed: Tensor, books: Tensor, layout: CodeLayout) -> Tensor:
    """``hidden`` (T, D) times every row of the table: (T, V). Expands no row and has no gradient.

    Each subvector of ``hidden`` is multiplied by every centroid of its place: S C D multiplications per token. A score
    is then the sum of S P of these products. Source: Jegou et al. 2011 (TPAMI 33), asymmetric distances.
    """
    count = packed.shape[0]
    result = hidden.new_empty(count, hidden.shape[0])
    # Every place needs its own products, even if places share a codebook.
    layout_per_place = CodeLayout(layout.width, layout.subvector, layout.stages, layout.centroids, shared=False)
    starts = layout_per_place.starts(packed.device)
    every = books.expand(layout.stages, layout.positions, layout.centroids, layout.subvector).flatten(0, 1)
    for first in range(0, hidden.shape[0], TOKENS_AT_ONCE):
        tokens = hidden[first : first + TOKENS_AT_ONCE]
        parts = tokens.view(-1, layout.positions, layout.subvector).permute(1, 2, 0).repeat(layout.stages, 1, 1)
        products = torch.bmm(every, parts).flatten(0, 1)
        for start in range(0, count, SCORED_AT_ONCE):
            places = layout_per_place.places(packed[start : start + SCORED_AT_ONCE], starts).flatten(1)
            total = F.embedding_bag(places, products, mode="sum")
            result[start : start + SCORED_AT_ONCE, first : first + TOKENS_AT_ONCE] = total
    return result.T


def encode_lengths(lengths: Tensor) -> Tensor:
    """(N,) float -> (N,) uint8. Numbers that are not positive become zero; too large ones become the largest length."""
    codes = (lengths.double().clamp_min(1e-30).log2() * STEPS_PER_OCTAVE).round() + LENGTH_ONE
    return torch.where(lengths > 0, codes.clamp(1, 255), 0.0).to(torch.uint8)


def decode_lengths(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """(N,) uint8 -> (N,) of ``dtype``."""
    levels = torch.exp2((torch.arange(256, device=codes.device) - LENGTH_ONE).double() / STEPS_PER_OCTAVE)
    levels[0] = 0
    return levels.to(dtype).index_select(0, codes.int())
