"""Older entries are pooled, several into one: keys with keys, and values with values.

Keys are pooled as they are cached, so after their rotary positions are applied. A group is complete before the first
query that sees it pooled, so a text may be cut anywhere.
"""

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.attention.masks import View
from taut.ops.caches.base import Incoming, gathered
from taut.ops.caches.pooling import POOLS, Compressor, Pool
from taut.ops.caches.quantized import RowStore, rounded
from taut.ops.caches.queues import Compression, Intake, QueueCache, QueueLayer, QueuePlaces


class CompressedLayer(QueueLayer):
    """The entries of one layer: the pooled ones, then tokens.

    ``pools`` are the functions that pool keys and values. If ``watching``, ``groups`` are the keys and the values that
    the pass has pooled, (B, H', G, rate, K).
    """

    def __init__(self, rate: int, store: RowStore | None) -> None:
        super().__init__(rate, store)
        self.pools: tuple[Pool, Pool] | None = None
        self.watching = False
        self.groups: tuple[Tensor, Tensor] | None = None
        self.like: Tensor | None = None
        """An empty tensor with the width and dtype of the keys that are attended to."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add (B, H', T, K) new keys and values -> (B, H', S, K), all that this pass attends to."""
        attended = super().update(key_states, value_states)
        stored, attended = self._with_groups(self.turn, attended)
        if self.record_past:
            self.pending += key_states.shape[2]
            self.like = key_states.new_empty(0, key_states.shape[-1])
        else:
            self.keep(self.turn, *stored)
        return attended

    def absorb(self, kept: Intake | None) -> None:
        self.pending = 0
        if kept is not None:
            attended = self.to_attend(self.keys, self.like), self.to_attend(self.values, self.like)
            self.keep(kept, *self._with_groups(kept, attended)[0])

    def rest(self) -> None:
        """End the pass. The pools stay while tokens are pending, because these may still be pooled."""
        self.groups = None
        if not self.pending:
            self.pools = None

    def _with_groups(
        self, intake: Intake, attended: tuple[Tensor, Tensor]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Append the groups that are complete now, pooled, to the stored keys and values and to the ``attended`` ones.

        Returns both pairs. They differ only in a cache with a store.
        """
        if intake.members is None:
            return (self.keys, self.values), attended
        keys, values = (gathered(tensor, intake.members).unflatten(2, (-1, self.rate)) for tensor in attended)
        if self.watching:
            self.groups = keys, values
        pairs = [
            self._joined(stored, seen, pool(groups))
            for stored, seen, pool, groups in zip(
                (self.keys, self.values), attended, self.pools, (keys, values), strict=True
            )
        ]
        return (pairs[0][0], pairs[1][0]), (pairs[0][1], pairs[1][1])

    def _joined(self, stored: Tensor, attended: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, H', G, K) pooled entries to both."""
        if self.store is None:
            together = torch.cat([attended, pooled], 2)
            return together, together
        return torch.cat([stored, self.to_hold(pooled)], 2), torch.cat([attended, rounded(pooled, self.store)], 2)

    def reset(self) -> None:
        super().reset()
        self.pools = self.groups = self.like = None


class CompressedCache(QueueCache):
    """Keeps the recent entries of ``layers`` layers, and before them pooled older ones.

    ``pool`` is a name in POOLS, or else of a pool that the model has learned (ops.caches.pooling.Compressor).
    """

    layers: list[CompressedLayer]

    def __init__(self, layers: int, compression: Compression, pool: str, store: RowStore | None = None) -> None:
        super().__init__([CompressedLayer(compression.rate, store) for _ in range(layers)], compression)
        self.pool = pool
        self.learned: Compressor | None = None
        self.seen: Tensor | None = None
        """(B or 1, T, G) bool: which new groups each query compares. None unless the compressor learns from that."""

    def begin(self, incoming: Incoming) -> None:
        if self.pool not in POOLS and incoming.learned is None:
            raise TautError(f"this cache needs a model with a learned pool ({self.pool}), but this model has none")
        places, queries, rate = self.start(incoming), incoming.queries, self.compression.rate
        self.width = self.columns + places.new.shape[1] + places.formed.shape[1]
        if not places.gapless or places.formed.shape[1]:
            wholes = [self.compression.last(tensor) for tensor in (places.groups, places.formed)]
            self.key_positions = torch.cat([wholes[0], places.tokens, places.new, wholes[1]], 1)
            parts = [tensor.div(rate, rounding_mode="floor") * 2 for tensor in (places.tokens, places.new)]
            marks = torch.cat([places.groups * 2 + 1, *parts, places.formed * 2 + 1], 1)
            self.marks = self.compression.groups(places.new[:, -queries:].clamp(min=0)), marks
        self._prepare(incoming, places)

    def attended(self, layer: int, query: Tensor, keys: Tensor, view: View, scaling: float) -> None:
        """Compare what the queries see of the groups before and after pooling, if the compressor learns from that."""
        groups = self.layers[layer].groups
        if groups is not None:
            self.learned.compare(layer, query, groups, self.seen, scaling)

    def finish(self) -> None:
        super().finish()
        self.learned = self.seen = None
        for layer in self.layers:
            layer.rest()

    def _prepare(self, incoming: Incoming, places: QueuePlaces) -> None:
        """Give the layers their pools. If the compressor learns, choose for each query the new groups to compare: those
        that end before it."""
        fixed, self.learned = POOLS.get(self.pool), incoming.learned
        watching = fixed is None and self.learned.errors is not None
        for index, layer in enumerate(self.layers):
            layer.pools = self.learned.pools(index) if fixed is None else (fixed, fixed)
            layer.watching = watching
        if watching:
            asked = places.new[:, -incoming.queries :, None]
            formed = places.formed[:, None]
            seen = (formed >= 0) & (self.compression.last(formed) < asked)
            self.seen = seen if incoming.real is None else seen & incoming.real[..., None]
