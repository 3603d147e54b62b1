"""Exact attention to one's own section and to a few keys before it: a loop of fused calls, never T x S.

A text under a ``Marked`` pattern falls into sections. A block of queries sees its own sections, which lie side by side,
and of what is older the kept keys alone: those are gathered once, and a block takes as many of them as are older than
its sections. Training under the anchors' mask (Pang et al. 2024, 2402.07616) costs what is looked at; the loop is ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.ops.attention import blocked
from taut.ops.attention.masks import View
from taut.ops.caches.base import gathered

WORTH = 0.7
"""The share of all pairs from which on one call with a mask of them all is as fast."""


@dataclass(frozen=True)
class SectionBlock:
    """The queries ``rows`` see keys ``low`` to ``high``, and those of the first ``count`` kept ones that are older."""

    rows: slice
    count: int
    low: int
    high: int

    @property
    def pairs(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.count + self.high - self.low)


@dataclass(frozen=True)
class SectionPlan:
    """Places (B or 1, C) of the kept keys, oldest first, which of these are some, (B or 1, C) bool, and the blocks."""

    kept: Tensor
    real: Tensor
    blocks: tuple[SectionBlock, ...]


def plan(view: View, device: torch.device, rows: int | None = None) -> SectionPlan | None:
    """How to go about it in blocks of ``rows`` queries; None where a view is not of this kind, or is read as fast in
    one call. Looked up once for all layers.

    On a GPU only where ``rows`` are given: launching the loop's kernels costs more there than looking at all pairs, 1.3
    to 5 times at up to 8192 tokens (H200, ``benchmarks/anchor_attention.py``).
    """
    memo = ("sections", device, rows)
    if memo not in view.memo:
        suits = view.marks is not None and view.causal and (rows is not None or device.type == "cpu")
        view.memo[memo] = _planned(view, device, rows or blocked.CPU_ROWS) if suits else None
    return view.memo[memo]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: View,
    plan: SectionPlan,
    *,
    scaling: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention under ``view`` as planned: query (B, H, T, K), key and value (B, H', S, K) with H a multiple of
    H' -> (B, T, H, K), any floating dtype. ``scaling`` None: K^-1/2. Queries that see nothing (padding) get finite
    values without meaning."""
    pieces = query.split([block.rows.stop - block.rows.start for block in plan.blocks], 2)
    seen = zip(*(_seen(each, plan) for each in (key, value)), strict=True)
    found = (
        blocked.fused(rows, keys, values, _mask(view, plan, block, query), None, scaling=scaling, dropout=dropout)
        for block, rows, (keys, values) in zip(plan.blocks, pieces, seen, strict=True)
    )
    return torch.cat([each.transpose(1, 2) for each in found], 1)


def _seen(held: Tensor, plan: SectionPlan) -> Iterator[Tensor]:
    """The keys or values of each block, (B, H', s, K): kept ones, then its own."""
    own = blocked.slices(held, [(block.rows, [(block.low, block.high)]) for block in plan.blocks])
    older = blocked.slices(
        gathered(held, plan.kept), [(block.rows, [(0, block.count)]) for block in plan.blocks if block.count]
    )
    for block, each in zip(plan.blocks, own, strict=True):
        yield torch.cat([next(older), each], 2) if block.count else each


def _planned(view: View, device: torch.device, rows: int) -> SectionPlan | None:
    if view.queries <= rows or (found := view.pattern.sections(*view.marks)) is None:
        return None
    starts, kept = found
    if view.key_positions is not None:
        kept = kept & (view.key_positions.to(device) >= 0)
    before = torch.nn.functional.pad(kept.long().cumsum(1).amax(0), (1, 0))
    first = starts.amin(0)[::rows]
    # One look at the device.
    lows, counts = torch.stack([first, before[first]]).tolist()
    blocks = []
    for top, low, count in zip(range(0, view.queries, rows), lows, counts, strict=True):
        bottom = min(top + rows, view.queries)
        high = bottom + view.keys - view.queries
        # Some keys more, as the fused kernels are faster then.
        low = max(0, low - (low - high - count) % blocked.ALIGNMENT)
        blocks.append(SectionBlock(slice(top, bottom), count if low else 0, low, high))
    if sum(block.pairs for block in blocks) > WORTH * view.queries * view.keys:
        return None
    order = (~kept).long().argsort(dim=1, stable=True)[:, : max(counts)]
    real = torch.arange(order.shape[1], device=device) < kept.sum(1, keepdim=True)
    return SectionPlan(order, real, tuple(blocks))


def _mask(view: View, plan: SectionPlan, block: SectionBlock, query: Tensor) -> Tensor | None:
    """The additive mask of a block, (B or 1, 1, t, s), shared by layers; None when all is seen."""
    memo = ("sections", block.rows.start, block.rows.stop, query.dtype)
    if memo not in view.memo:
        allowed = view.block(block.rows, slice(block.low, block.high), query.device)
        if block.count:
            places = plan.kept[:, : block.count]
            older = view.block(block.rows, places, query.device)
            older = older & (plan.real[:, : block.count] & (places < block.low))[:, None, None]
            batch = max(len(older), len(allowed))
            allowed = torch.cat([each.expand(batch, -1, -1, -1) for each in (older, allowed)], -1)
        view.memo[memo] = blocked.additive(allowed, query.dtype)
    return view.memo[memo]
