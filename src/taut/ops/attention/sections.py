"""Exact attention of each query to its own section and a few keys before it: a loop of fused calls, never T x S.

A ``Marked`` pattern divides a text into sections. A block of queries sees its own sections, which are neighbours, and
among the older keys only the kept ones. The kept keys are gathered once, and a block takes those older than its
sections. So training under the anchors' mask (Pang et al. 2024, 2402.07616) costs only the pairs that are seen. The
loop is ours.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.ops.attention import blocked
from taut.ops.attention.masks import View
from taut.ops.caches.base import gathered

WORTH = 0.7
"""From this share of all pairs on, one call with a mask over all pairs is as fast."""


@dataclass(frozen=True)
class SectionBlock:
    """The queries ``rows`` see the keys ``low`` to ``high``, and of the first ``count`` kept keys the older ones."""

    rows: slice
    count: int
    low: int
    high: int

    @property
    def pairs(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.count + self.high - self.low)


@dataclass(frozen=True)
class SectionPlan:
    """The blocks, and the indices ``kept`` (B or 1, C) of the kept keys, oldest first. ``real`` is False for filler."""

    kept: Tensor
    real: Tensor
    blocks: tuple[SectionBlock, ...]


def plan(view: View, device: torch.device, rows: int | None = None) -> SectionPlan | None:
    """The plan in blocks of ``rows`` queries, made once for all layers. None if the view has no sections, or if one
    call is as fast.

    On a GPU only if ``rows`` is given: there, launching the loop's kernels takes 1.3 to 5 times as long as computing
    all pairs, at up to 8192 tokens (H200, ``benchmarks/anchor_attention.py``).
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
    """Softmax attention under ``view``, following ``plan``: query (B, H, T, K), key and value (B, H', S, K) with H a
    multiple of H' -> (B, T, H, K), any floating dtype. ``scaling`` None: K^-1/2. Queries that see nothing (padding) get
    finite but meaningless values."""
    pieces = query.split([block.rows.stop - block.rows.start for block in plan.blocks], 2)
    seen = zip(*(_seen(tensor, plan) for tensor in (key, value)), strict=True)
    parts = (
        blocked.fused(rows, keys, values, _mask(view, plan, block, query), None, scaling=scaling, dropout=dropout)
        for block, rows, (keys, values) in zip(plan.blocks, pieces, seen, strict=True)
    )
    return torch.cat([tensor.transpose(1, 2) for tensor in parts], 1)


def _seen(held: Tensor, plan: SectionPlan) -> Iterator[Tensor]:
    """The keys or values of each block, (B, H', s, K): the kept ones, then those of its own sections."""
    near = blocked.slices(held, [(block.rows, [(block.low, block.high)]) for block in plan.blocks])
    older = blocked.slices(
        gathered(held, plan.kept), [(block.rows, [(0, block.count)]) for block in plan.blocks if block.count]
    )
    for block, tensor in zip(plan.blocks, near, strict=True):
        yield torch.cat([next(older), tensor], 2) if block.count else tensor


def _planned(view: View, device: torch.device, rows: int) -> SectionPlan | None:
    if view.queries <= rows or (parts := view.pattern.sections(*view.marks)) is None:
        return None
    starts, kept = parts
    if view.key_positions is not None:
        kept = kept & (view.key_positions.to(device) >= 0)
    before = torch.nn.functional.pad(kept.long().cumsum(1).amax(0), (1, 0))
    first = starts.amin(0)[::rows]
    # One device synchronisation for both.
    lows, counts = torch.stack([first, before[first]]).tolist()
    blocks = []
    for top, low, count in zip(range(0, view.queries, rows), lows, counts, strict=True):
        bottom = min(top + rows, view.queries)
        high = bottom + view.keys - view.queries
        # Some extra keys, because the fused kernels are faster with a multiple of ``ALIGNMENT``.
        low = max(0, low - (low - high - count) % blocked.ALIGNMENT)
        blocks.append(SectionBlock(slice(top, bottom), count if low else 0, low, high))
    if sum(block.pairs for block in blocks) > WORTH * view.queries * view.keys:
        return None
    order = (~kept).long().argsort(dim=1, stable=True)[:, : max(counts)]
    real = torch.arange(order.shape[1], device=device) < kept.sum(1, keepdim=True)
    return SectionPlan(order, real, tuple(blocks))


def _mask(view: View, plan: SectionPlan, block: SectionBlock, query: Tensor) -> Tensor | None:
    """The additive mask of a block, (B or 1, 1, t, s), shared by layers; None when every key is seen."""
    memo = ("sections", block.rows.start, block.rows.stop, query.dtype)
    if memo not in view.memo:
        allowed = view.block(block.rows, slice(block.low, block.high), query.device)
        if block.count:
            places = plan.kept[:, : block.count]
            older = view.block(block.rows, places, query.device)
            older = older & (plan.real[:, : block.count] & (places < block.low))[:, None, None]
            batch = max(len(older), len(allowed))
            allowed = torch.cat([tensor.expand(batch, -1, -1, -1) for tensor in (older, allowed)], -1)
        view.memo[memo] = blocked.additive(allowed, query.dtype)
    return view.memo[memo]
