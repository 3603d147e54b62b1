"""Exact window and global attention: a loop of fused calls over contiguous slices, never T x S.

Source: the patterns of Longformer (Beltagy et al. 2020, 2004.05150) and BigBird (Zaheer et al. 2020, 2007.14062); the
loop over slices is ours. It needs no compiler and no gather. It can be trained, on a CPU too.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.ops.attention.masks import AnyOf, Causal, Global, Pattern, Sink, View, Window

CPU_ROWS = 64
"""Queries per block. Fewer would cost more calls; more would only add masked keys."""
DEVICE_ROWS = 512
"""Queries per block on accelerators, where launching a kernel costs more than the masked keys."""
ALIGNMENT = 16
"""Blocks are widened to a multiple of this many keys: the fused kernels are faster then."""

Span = tuple[int, int]
Block = tuple[slice, list[Span]]


def local(window: int, first: int, causal: bool) -> Pattern:
    """The pattern of ``window`` positions to each side (itself included; only to the left when causal), and of the
    ``first`` tokens. All queries see these, and when not causal, these see all keys."""
    if causal:
        return Sink(first, window)
    return AnyOf((Window(window, causal=False), Global(first))) if first else Window(window, causal=False)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: View,
    *,
    window: int,
    first: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    rows: int | None = None,
) -> Tensor:
    """Softmax attention within ``local(window, first, view.causal)`` and ``view``.

    query (B, H, T, K), key and value (B, H', S, K) with H a multiple of H' -> (B, T, H, K), any floating dtype.
    ``scaling`` defaults to K^-1/2; ``position_bias`` (B or 1, H, T, S) is added to the scores; ``rows`` is the number
    of queries per block. Queries that see nothing (padding) get finite but meaningless values.
    """
    options = {"scaling": scaling, "dropout": dropout}
    if window >= view.keys and view.key_positions is None:
        return dense(query, key, value, view, position_bias=position_bias, **options)
    pattern = local(window, first, view.causal)
    if view.key_positions is not None or (view.packed is not None and first):
        # A cache with gaps is small, and a window is no slice of it. Packed sequences have first tokens anywhere.
        return dense(query, key, value, view, pattern=pattern, position_bias=position_bias, **options)

    plan = list(_plan(view, window, first, rows or (CPU_ROWS if query.device.type == "cpu" else DEVICE_ROWS)))
    # Split, not sliced: the gradient of each slice would be as large as all queries.
    pieces = query.split([block.stop - block.start for block, _ in plan], 2)
    blocks = (
        fused(rows, keys, values, _mask(view, pattern, (block, spans), query), bias, **options)
        for (block, spans), rows, keys, values, bias in zip(
            plan, pieces, slices(key, plan), slices(value, plan), _bias(position_bias, plan), strict=True
        )
    )
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return torch.cat([part.transpose(1, 2) for part in blocks], 1)
    # Write each block into place: collecting all blocks first would double the memory.
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for (block, _), part in zip(plan, blocks, strict=True):
        out[:, block] = part.transpose(1, 2)
    return out


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: View,
    *,
    pattern: Pattern | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
) -> Tensor:
    """One fused call over all keys, with a T x S mask if ``view`` and ``pattern`` need one. Shapes as in ``attend``."""
    mask = view.dense(query.device, pattern)
    queries, groups = query.shape[2], query.shape[1] // key.shape[1]
    causal = mask is None and view.causal and queries > 1
    if causal:
        # A static cache is longer than the entries it holds, and is_causal counts from its first entry.
        key, value = key[:, :, :queries], value[:, :, :queries]
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        if causal:
            mask, causal = torch.ones(queries, queries, dtype=torch.bool, device=key.device).tril(), False
        if mask is None or mask.is_floating_point():
            mask = position_bias if mask is None else position_bias + mask
        else:
            mask = position_bias.masked_fill(~mask, torch.finfo(query.dtype).min)
    out = F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=causal, scale=scaling, enable_gqa=groups > 1
    )
    return out.transpose(1, 2)


def computed_pairs(length: int, window: int, first: int, causal: bool, rows: int = CPU_ROWS) -> int:
    """How many scores ``attend`` computes on the CPU for ``length`` queries and keys, including the masked ones in its
    blocks."""
    if window >= length:
        return length**2
    plan = _plan(View(1, length, length, causal=causal), window, first, rows)
    return sum((block.stop - block.start) * sum(high - low for low, high in spans) for block, spans in plan)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    allowed: Tensor,
    *,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
) -> Tensor:
    """The formula: softmax(scaling q.k + bias) v over the ``allowed`` (B or 1, 1, T, S) pairs; queries without any get
    zero. Shapes as in ``attend``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if position_bias is not None:
        scores = scores + position_bias
    weights = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~allowed, 0.0)
    return (weights @ value).transpose(1, 2)


def _plan(view: View, window: int, first: int, rows: int) -> Iterator[Block]:
    """Blocks of queries, each with the one or two spans of keys that it may see."""
    shift = view.query_start - view.key_start
    reach = view.reach(first)
    start = 0
    if reach and not view.causal:
        # Global queries see all keys. With left padding their places differ by row, so take all up to the last one.
        start = min(max(0, reach - shift), view.queries)
        if start:
            yield slice(0, start), [(0, view.keys)]
    for top in range(start, view.queries, rows):
        bottom = min(top + rows, view.queries)
        low = max(0, top + shift - window + 1)
        high = min(view.keys, bottom + shift + (0 if view.causal else window - 1))
        low = max(0, low - (low - high - reach) % ALIGNMENT)
        if reach and low > reach:
            yield slice(top, bottom), [(0, reach), (low, high)]
        else:
            yield slice(top, bottom), [(0 if reach else low, high)]


def _mask(view: View, pattern: Pattern, block: Block, query: Tensor) -> Tensor | None:
    """The additive mask of a block, (B or 1, 1, t, s); None when every key is seen. Layers share these masks. Blocks
    that differ only in their position share one too. Additive, because the CPU kernel converts a bool mask at every
    call. Finite, because a row that sees nothing must not become NaN."""
    rows, spans = block
    columns = [slice(*span) for span in spans]

    def allowed() -> Tensor:
        return torch.cat([view.block(rows, part, query.device, pattern) for part in columns], -1)

    if view.rule is not None or view.marks is not None or any(view.padded(part) for part in columns):
        return additive(allowed(), query.dtype)
    low = spans[-1][0]
    memory = view.pattern or Causal()
    inner = low >= view.reach(pattern.repeats_from) + memory.repeats_from
    turn = rows.start % math.lcm(pattern.period, memory.period)
    place = (rows.start - low, turn) if inner else (rows.start, low)
    memo = (pattern, inner, place, rows.stop - rows.start, *(high - low for low, high in spans), query.dtype)
    if memo not in view.memo:
        view.memo[memo] = additive(allowed(), query.dtype)
    return view.memo[memo]


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A bool mask -> the mask to add to scores, 0 or the least number of ``dtype``; None when every key is seen."""
    if bool(allowed.all()):
        return None
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)


def fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, *, scaling: Any, dropout: float
) -> Tensor:
    """One fused call on a block: (B, H, t, K), (B, H', s, K) -> (B, H, t, K)."""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    if bias is not None:
        mask = bias if mask is None else bias + mask
    if groups > 1:
        # Heads that share keys become rows of one head, so the keys are not copied.
        query = query.reshape(batch, key.shape[1], groups * rows, width)
        if mask is not None:
            mask = mask.expand(-1, heads if bias is not None else groups, -1, -1)
            mask = mask.reshape(mask.shape[0], -1, groups * rows, key.shape[2])
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    return out.reshape(batch, heads, rows, -1)


class _Slices(torch.autograd.Function):
    """Slices of (B, H, S, K) whose gradients are summed in place. Ordinary slicing would make a full-size tensor of
    zeros for each block, which costs quadratic memory again."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, spans: list[Span]) -> tuple[Tensor, ...]:
        ctx.shape, ctx.spans = tensor.shape, spans
        return tuple(tensor[:, :, low:high] for low, high in spans)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].new_zeros(ctx.shape)
        for (low, high), gradient in zip(ctx.spans, gradients, strict=True):
            total[:, :, low:high] += gradient
        return total, None


def slices(tensor: Tensor, plan: list[Block]) -> Iterator[Tensor]:
    """The keys or values of each block, (B, H', s, K): a view if a block has one span."""
    if torch.is_grad_enabled() and tensor.requires_grad:
        pieces = iter(_Slices.apply(tensor, [span for _, spans in plan for span in spans]))
    else:
        pieces = (tensor[:, :, low:high] for _, spans in plan for low, high in spans)
    for _, spans in plan:
        parts = [next(pieces) for _ in spans]
        yield parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _bias(bias: Tensor | None, plan: list[Block]) -> Iterator[Tensor | None]:
    """The part of a (B or 1, H, T, S) bias that belongs to each block."""
    for rows, spans in plan:
        if bias is None:
            yield None
        else:
            yield torch.cat([bias[:, :, rows, low:high] for low, high in spans], -1)
