"""Token tables as tensor trains: lookup with shared prefixes, its gradient, the dense equivalent and the tied head.

The V rows are numbered by K digits, most significant first: i = i_1 p_2 ... p_K + ... + i_K, with P = p_1 ... p_K
>= V. The D = q_1 ... q_K columns are numbered likewise. An entry is a product of K matrices, each chosen by one pair of
digits: E[i, j] = G_1[i_1, j_1] ... G_K[i_K, j_K], with G_k[i_k, j_k] of r_{k-1} x r_k and r_0 = r_K = 1. Core k is a
tensor of (p_k, r_{k-1}, q_k r_k). The *slice* of a row digit is therefore one contiguous matrix.
Source: Oseledets 2011 (Tensor-Train Decomposition); for tables Hrinchuk et al. 2020 (arXiv 1901.10787).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NUMBERS_AT_ONCE = 1 << 19
"""How many numbers one step of a lookup gathers: as many as stay in the cache of a CPU core."""
STATE_AT_ONCE = 1 << 24
"""How many numbers the contraction of a tied head may hold between two cores."""


@dataclass(frozen=True)
class TrainShape:
    """The shape of a tensor train: ``rows`` p_1 ... p_K, ``columns`` q_1 ... q_K, ``ranks`` r_1 ... r_{K-1}."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ranks: tuple[int, ...]

    @cached_property
    def cores(self) -> tuple[tuple[int, int, int], ...]:
        """(p_k, r_{k-1}, q_k r_k) of every core."""
        table = zip(self.rows, self.columns, (1, *self.ranks), (*self.ranks, 1), strict=True)
        return tuple((p, left, q * right) for p, q, left, right in table)

    @property
    def capacity(self) -> int:
        """P, the number of rows that the digits can number."""
        return math.prod(self.rows)

    @property
    def block(self) -> int:
        """The number of rows that share the first digit."""
        return self.capacity // self.rows[0]

    @property
    def numbers(self) -> int:
        return sum(math.prod(core) for core in self.cores)

    def lookup_flops(self) -> int:
        """FLOPs of looking up one vector that shares no prefix with another."""
        later = zip(self._before, self.cores[1:], strict=True)
        return sum(2 * before * left * width for before, (_, left, width) in later)

    def expansion_flops(self, count: int) -> int:
        """FLOPs of computing the first ``count`` rows, in whole blocks."""
        flops, rows = 0, -(-count // self.block)
        for before, (p, left, width) in zip(self._before, self.cores[1:], strict=True):
            flops += 2 * rows * before * left * p * width
            rows *= p
        return flops

    def contraction_flops(self) -> int:
        """FLOPs of scoring one hidden state against all P rows without computing the rows."""
        return sum(2 * numbers * width for numbers, width in self._states)

    def widest_state(self) -> int:
        """The most numbers held between two cores while one hidden state is contracted."""
        return max(numbers for numbers, _ in self._states)

    def head_flops(self, count: int, tokens: int) -> int:
        """FLOPs of the cheaper way to score ``tokens`` hidden states against ``count`` rows."""
        product = 2 * tokens * count * math.prod(self.columns)
        return min(self.expansion_flops(count) + product, tokens * self.contraction_flops())

    def expands(self, count: int, tokens: int) -> bool:
        """Whether computing the rows once and multiplying is less work than contracting core by core."""
        return self.head_flops(count, tokens) < tokens * self.contraction_flops()

    @cached_property
    def _before(self) -> tuple[int, ...]:
        """The products q_1, q_1 q_2, ... without that of the last core."""
        return tuple(accumulate(self.columns[:-1], mul))

    @cached_property
    def _states(self) -> tuple[tuple[int, int], ...]:
        """For contracting one hidden state, last core first: (numbers held after the core, terms of each number)."""
        states, rows = [], 1
        for before, (p, left, width) in zip((*reversed(self._before), 1), reversed(self.cores), strict=True):
            rows *= p
            states.append((before * rows * left, width))
        return tuple(states)


@dataclass(frozen=True)
class Level:
    """The distinct prefixes (i_1, ..., i_k) of some rows.

    ``digits`` (n,) holds the last digit of each prefix. ``parents`` (n,) holds the place of (i_1, ..., i_{k-1}) in the
    level before, or is None when the order is the same.
    """

    digits: Tensor
    parents: Tensor | None


def prefixes(positions: Tensor, rows: Sequence[int], share: bool) -> tuple[Level, ...]:
    """The K levels of prefixes of the rows ``positions`` (n,) int64.

    With ``share`` equal prefixes are computed once. ``positions`` must then be sorted.
    """
    levels = []
    for count in reversed(rows[1:]):
        digits, above = positions % count, positions // count
        parents = None
        if share:
            above, parents = torch.unique_consecutive(above, return_inverse=True)
        levels.append(Level(digits, parents))
        positions = above
    return Level(positions, None), *reversed(levels)


def vectors(levels: Sequence[Level], cores: Sequence[Tensor]) -> Tensor:
    """Compute the rows of the last of ``levels``: (n, D). ``cores`` are (slices, r_{k-1}, q_k r_k), indexed by digits.

    Differentiable once. Extra memory O(n). Each row is a separate product of matrices, so its bits do not depend on
    the other rows.
    """
    digits, parents = tuple(level.digits for level in levels), tuple(level.parents for level in levels[1:])
    return _Vectors.apply(digits, parents, *cores)


class _Vectors(torch.autograd.Function):
    """Multiply cores from left to right. Keeps the products of prefixes for the gradient, not gathered slices."""

    @staticmethod
    def forward(ctx: Any, digits: tuple[Tensor, ...], parents: tuple[Tensor | None, ...], *cores: Tensor) -> Tensor:
        products = [cores[0].index_select(0, digits[0])]
        for core, last, above in zip(cores[1:], digits[1:], parents, strict=True):
            left = _columns_first(products[-1], core.shape[1])
            out = left.new_empty(len(last), left.shape[1], core.shape[2])
            for part in _pieces(len(last), left[:1].numel() + core[0].numel() + out[:1].numel()):
                torch.bmm(_rows(left, above, part), _slices(core, last[part]), out=out[part])
            products.append(out)
        ctx.digits, ctx.parents = digits, parents
        ctx.save_for_backward(*cores, *products[:-1])
        return products[-1].flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        depth = len(ctx.digits)
        cores, products = ctx.saved_tensors[:depth], ctx.saved_tensors[depth:]
        by_core: list[Tensor] = []
        for step in range(depth - 1, 0, -1):
            core, last, above = cores[step], ctx.digits[step], ctx.parents[step - 1]
            left = _columns_first(products[step - 1], core.shape[1])
            gradient = gradient.reshape(len(last), left.shape[1], core.shape[2])
            total, before = _sums(core), _sums(left)
            for part in _pieces(len(last), left[:1].numel() + core[0].numel() + gradient[:1].numel()):
                piece = gradient[part]
                _add_slices(total, last[part], _rows(left, above, part), piece)
                inward = torch.bmm(piece, _slices(core, last[part]).mT).to(before.dtype)
                if above is None:
                    before[part] = inward
                else:
                    before.index_add_(0, above[part], inward)
            by_core.append(total.to(core.dtype))
            gradient = before.to(core.dtype)
        first = _sums(cores[0])
        first.index_add_(0, ctx.digits[0], gradient.reshape(-1, *first.shape[1:]).to(first.dtype))
        return None, None, first.to(cores[0].dtype), *reversed(by_core)


def expand(cores: Sequence[Tensor], first: int = 0, last: int | None = None) -> Tensor:
    """Compute all rows whose first digit is at least ``first`` and below ``last`` by plain products: (rows, D)."""
    rows = cores[0][first:last]
    for core in cores[1:]:
        rows = _columns_first(rows, core.shape[1])
        count, columns, rank = rows.shape
        product = rows.reshape(-1, rank) @ core.transpose(0, 1).reshape(rank, -1)
        rows = product.view(count, columns, core.shape[0], -1).transpose(1, 2).reshape(-1, columns, core.shape[2])
    return rows.flatten(1)


def scores(hidden: Tensor, cores: Sequence[Tensor], shape: TrainShape, count: int) -> Tensor:
    """Score (..., D) hidden states against the first ``count`` rows: (..., ``count``).

    ``shape.expands`` decides the way. Works through blocks of rows or of hidden states, so it never holds the dense
    table, not even while gradients are recorded.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    if shape.expands(count, len(flat)):
        pieces = [_recomputed(_block_scores, flat, block, count, *cores) for block in range(-(-count // shape.block))]
        logits = torch.cat(pieces, dim=1)
    else:
        states = max(1, STATE_AT_ONCE // shape.widest_state())
        logits = torch.cat([_recomputed(_contract, piece, count, *cores) for piece in flat.split(states)])
    return logits.view(*hidden.shape[:-1], count)


def _recomputed(function: Any, *arguments: Any) -> Tensor:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return checkpoint(function, *arguments, use_reentrant=False)
    return function(*arguments)


def _block_scores(hidden: Tensor, block: int, count: int, *cores: Tensor) -> Tensor:
    rows = expand(cores, block, block + 1)
    return F.linear(hidden, rows[: count - block * len(rows)])


def _contract(hidden: Tensor, count: int, *cores: Tensor) -> Tensor:
    """Contract cores from right to left: (T, D) -> (T, ``count``). The state is (T, columns left, rows done, rank)."""
    tokens = len(hidden)
    state = hidden.view(tokens, -1, 1, 1)
    for core in reversed(cores):
        p, left, width = core.shape
        done, rank = state.shape[2:]
        terms = state.view(tokens, -1, width // rank, done, rank).transpose(2, 3).reshape(-1, width)
        state = terms @ core.permute(2, 0, 1).reshape(width, -1)
        state = state.view(tokens, -1, done, p, left).transpose(2, 3).reshape(tokens, -1, p * done, left)
    return state.view(tokens, -1)[:, :count]


def _columns_first(products: Tensor, rank: int) -> Tensor:
    """(n, Q, q r) -> (n, Q q, r)."""
    count, columns, width = products.shape
    return products.reshape(count, columns * (width // rank), rank)


def _rows(left: Tensor, above: Tensor | None, part: slice) -> Tensor:
    return left[part] if above is None else left.index_select(0, above[part])


def _slices(core: Tensor, digits: Tensor) -> Tensor:
    """The slice of each digit: (n, r, q r'). Does not copy a core of one slice."""
    return core.expand(len(digits), -1, -1) if len(core) == 1 else core.index_select(0, digits)


def _add_slices(total: Tensor, digits: Tensor, left: Tensor, gradient: Tensor) -> None:
    """Add the products of ``left`` (n, Q, r) and ``gradient`` (n, Q, q r') to the slices of ``digits``."""
    if len(total) == 1:
        total[0] += (left.flatten(0, 1).mT @ gradient.flatten(0, 1)).to(total.dtype)
    else:
        total.index_add_(0, digits, torch.bmm(left.mT, gradient).to(total.dtype))


def _sums(like: Tensor) -> Tensor:
    """Zeros of the shape of ``like``, to add many terms to, so in float32 at least."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _pieces(count: int, numbers: int) -> Iterator[slice]:
    step = max(1, NUMBERS_AT_ONCE // numbers)
    return (slice(start, start + step) for start in range(0, count, step))
