"""Attention whose scores depend on the distance between two tokens, and not otherwise on their positions.

Source: Transformer-XL (Dai et al. 2019, 1901.02860). A distance d is a vector R_d of sines and cosines, and a learned
map W turns it into a key. If the keys are at consecutive positions, a row of scores is a query's products with all
distances, shifted by one from row to row (a view, no copy). If a cache has gaps, the products are looked up.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.ops.attention.masks import WHOLE, View

CPU_ROWS = 128
"""Queries per block. Keys that no query of a block sees are left out. Only one block's scores are held at a time."""
DEVICE_ROWS = 512
"""Queries per block on accelerators, where launching a kernel costs more than computing masked scores."""


def sinusoid(distances: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(N,) integers -> R (N, ``width``): sines of the distance at frequencies 10000^(-2 i / width), then cosines.
    Computed in float32, or in float64 if that is the ``dtype``."""
    exact = torch.promote_types(dtype, torch.float32)
    powers = torch.arange(0, width, 2, device=distances.device, dtype=exact) / width
    angles = distances.to(exact)[:, None] * 10000.0**-powers
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width].to(dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    view: View,
    *,
    weight: Tensor,
    content_bias: Tensor,
    distance_bias: Tensor,
    clamp: int | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    rows: int | None = None,
) -> Tensor:
    """Softmax attention under ``view`` with scores scaling ((q_i + u).k_j + (q_i + v).(W R_{i-j})).

    query (B, H, T, K), key and value (B, H', S, K) with H a multiple of H' -> (B, T, H, K), any floating dtype.
    ``weight`` W (H' K, D): query heads that share keys also share the keys of distances. ``content_bias`` u and
    ``distance_bias`` v are (H K,). Distances beyond ``clamp`` on either side count as ``clamp``. ``scaling`` defaults
    to K^-1/2; ``rows`` is the number of queries per block. Queries that see no key (padding) get finite but meaningless
    values. Raises TautError for a cache that does not know the positions of its entries.
    """
    heads, width = query.shape[1], query.shape[3]
    scaling = width**-0.5 if scaling is None else scaling
    weight, u, v = (tensor.to(query.dtype) for tensor in (weight, content_bias, distance_bias))
    contents = query + u.view(heads, 1, width)
    places = (query + v.view(heads, 1, width)) * scaling
    scores: _Adjacent | _Scattered
    if view.key_positions is None:
        scores = _Adjacent(places, weight, key.shape[1], view, clamp, rows or _rows(query))
    else:
        scores = _Scattered(places, weight, key.shape[1], view, clamp)
    outputs = []
    for block, columns in scores.blocks():
        bias, hidden = scores.of(block, columns), _hidden(view, block, columns, query.device)
        if hidden is not None:
            # Finite, so that a query that sees no key does not give NaN.
            bias = bias.masked_fill(hidden, torch.finfo(bias.dtype).min)
        outputs.append(_fused(contents[:, :, block], key[:, :, columns], value[:, :, columns], bias, scaling, dropout))
    return torch.cat(outputs, 2).transpose(1, 2)


class _Adjacent:
    """Distance scores of keys at consecutive positions: one distance for each diagonal."""

    def __init__(self, query: Tensor, weight: Tensor, key_heads: int, view: View, clamp: int | None, rows: int) -> None:
        self.view, self.rows, self.lead = view, rows, view.query_start - view.key_start
        band = None if view.pattern is None else view.pattern.band
        self.window = band[0] if band is not None and not band[1] and view.causal else view.query_start + view.queries
        self.farthest = min(self.lead + view.queries - 1, self.window + rows - 2)
        memo = ("distances", clamp, weight.shape[1], query.dtype, self.farthest)
        if memo not in view.memo:
            nearest = -1 if view.causal else self.lead - view.keys
            distances = torch.arange(self.farthest, nearest - 1, -1, device=query.device)
            view.memo[memo] = sinusoid(_limited(distances, view, clamp), weight.shape[1], query.dtype)
        self.query, self.distances = _factors(query, weight, view.memo[memo], key_heads)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield each block of queries with the keys they may see."""
        for top in range(0, self.view.queries, self.rows):
            bottom = min(top + self.rows, self.view.queries)
            low, high = 0, self.view.keys
            if self.view.causal:
                low, high = max(0, top + self.lead - self.window + 1), min(high, bottom + self.lead)
            yield slice(top, bottom), slice(low, high)

    def of(self, rows: slice, columns: slice) -> Tensor:
        """Return the scores (B, H, t, s) of these queries and keys.

        Each query is multiplied with one distance more than it needs, farthest first; if causal, the last one has no
        meaning. Then each row is the row above, shifted by one.
        """
        queries, keys = rows.stop - rows.start, columns.stop - columns.start
        first = self.farthest - (self.lead + rows.stop - 1 - columns.start)
        count = keys + (1 if self.view.causal else queries)
        products = _products(self.query[:, :, rows], self.distances[..., first : first + count])
        shifted = products.flatten(2)[..., queries - 1 : queries - 1 + queries * (count - 1)]
        return shifted.unflatten(2, (queries, count - 1))[..., :keys]


class _Scattered:
    """Distance scores in a cache with gaps: one for each distance that occurs."""

    def __init__(self, query: Tensor, weight: Tensor, key_heads: int, view: View, clamp: int | None) -> None:
        memo = ("distances", clamp, weight.shape[1], query.dtype)
        if memo not in view.memo:
            distances, self.places = _limited(-view.distances(query.device), view, clamp).unique(return_inverse=True)
            view.memo[memo] = sinusoid(distances, weight.shape[1], query.dtype), self.places
        table, self.places = view.memo[memo]
        self.query, self.distances = _factors(query, weight, table, key_heads)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield everything as one block: such caches are small."""
        yield WHOLE, WHOLE

    def of(self, rows: slice, columns: slice) -> Tensor:
        """Return the scores (B, H, T, S) of these queries and all keys."""
        products = _products(self.query[:, :, rows], self.distances)
        return products.gather(3, self.places[:, None].expand(*products.shape[:2], -1, -1))


def _limited(distances: Tensor, view: View, clamp: int | None) -> Tensor:
    """Limit distances to ``clamp`` on both sides. Under a causal view, distances to later keys become 0."""
    if clamp is not None:
        distances = distances.clamp(-clamp, clamp)
    return distances.clamp(min=0) if view.causal else distances


def _factors(query: Tensor, weight: Tensor, table: Tensor, key_heads: int) -> tuple[Tensor, Tensor]:
    """Return two tensors whose product is q.(W R_d), (B, H, T, X) and (H' or 1, X, N).

    ``query`` is (B, H, T, K), ``weight`` W (H' K, D), ``table`` R (N, D). W is applied to the distances, or to the
    queries where that is less work (decoding).
    """
    batch, heads, queries, width = query.shape
    if batch * heads * queries < key_heads * width:
        mapped = _products(query, weight.view(key_heads, width, -1))
        return mapped, table.t()[None]
    return query, F.linear(table, weight).view(len(table), key_heads, width).permute(1, 2, 0)


def _products(query: Tensor, other: Tensor) -> Tensor:
    """Multiply (B, H, t, X) and (H' or 1, X, N) -> (B, H, t, N), contiguous.

    Query heads with the same other factor become rows of one matrix.
    """
    batch, heads, rows, width = query.shape
    shared = query.reshape(batch, other.shape[0], -1, width)
    return torch.matmul(shared, other).reshape(batch, heads, rows, -1)


def _hidden(view: View, rows: slice, columns: slice, device: torch.device) -> Tensor | None:
    """Return the hidden pairs, (B or 1, 1, t, s) bool, or None if all are visible. Computed once for all layers."""
    memo = ("hidden", rows.start, rows.stop, columns.start, columns.stop)
    if memo not in view.memo:
        hidden = ~view.block(rows, columns, device)
        view.memo[memo] = hidden if bool(hidden.any()) else None
    return view.memo[memo]


def _fused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float, dropout: float) -> Tensor:
    """Attend: (B, H, t, K), (B, H', s, K) and (B, H, t, s) -> (B, H, t, K).

    Query heads that share keys become rows of one head.
    """
    batch, heads, rows, width = query.shape
    shape = (batch, key.shape[1], heads // key.shape[1] * rows)
    out = F.scaled_dot_product_attention(
        query.reshape(*shape, width), key, value, bias.reshape(*shape, key.shape[2]), dropout, scale=scaling
    )
    return out.reshape(batch, heads, rows, value.shape[3])


def _rows(query: Tensor) -> int:
    return CPU_ROWS if query.device.type == "cpu" else DEVICE_ROWS
