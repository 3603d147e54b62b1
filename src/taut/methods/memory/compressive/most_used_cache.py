"""Of several older entries one stays as it is: in every head the one that was attended to most, on average.

Who that is shows only once their queries have been answered, so a pass sees all that was held before it and itself, and
groups that have left the memory by its end are reduced behind it.
"""

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.attention.masks import View
from taut.ops.caches.base import Incoming, gathered
from taut.ops.caches.eviction import Asked, AttentionMass
from taut.ops.caches.quantized import RowStore
from taut.ops.caches.queues import Compression, Intake, QueueCache, QueueLayer

NO_WAY_BACK = "pool = 'most_used' cannot take tokens back, as assisted decoding does: what they attended to has counted"
MASS = AttentionMass()


class UsedLayer(QueueLayer):
    """One layer's entries and their ``scores`` (B, H', S): the attention that each was given, summed over queries."""

    def __init__(self, rate: int, store: RowStore | None) -> None:
        super().__init__(rate, store)
        self.scores: Tensor | None = None

    def activate_past_recording(self) -> None:
        raise TautError(NO_WAY_BACK)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """(B, H', T, K) new keys and values -> (B, H', S, K), all that this pass attends to."""
        attended = super().update(key_states, value_states)
        first = MASS.first(key_states)
        self.scores = first if self.scores is None else torch.cat([self.scores, first], 2)
        return attended

    @torch.no_grad()
    def rescore(self, keys: Tensor, asked: Asked) -> None:
        self.scores = MASS.after(self.scores, keys, asked)

    def absorb(self, kept: Intake) -> None:
        keys, values, scores = self.keys, self.values, self.scores[..., None]
        if kept.members is not None:
            chosen = self._chosen(kept)
            keys, values, scores = (torch.cat([each, gathered(each, chosen)], 2) for each in (keys, values, scores))
        self.scores = (scores if kept.index is None else gathered(scores, kept.index))[..., 0]
        self.keep(kept, keys, values)

    def _chosen(self, kept: Intake) -> Tensor:
        """The columns of the most used of every group, (B, H', G); the first of equals."""
        used = gathered(self.scores[..., None], kept.members)[..., 0] / kept.ages[:, None]
        best = used.unflatten(2, (-1, self.rate)).argmax(3, keepdim=True)
        members = kept.members.unflatten(1, (-1, self.rate))[:, None]
        return members.expand(*best.shape[:3], self.rate).gather(3, best)[..., 0]

    def reset(self) -> None:
        super().reset()
        self.scores = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.scores is not None:
            self.scores = self.scores.repeat_interleave(repeats, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def _take(self, rows: Tensor) -> None:
        if self.scores is not None:
            self.scores = self.scores[rows.to(self.scores.device)]


class UsedCache(QueueCache):
    """Recent entries of ``layers`` layers, and before them the most used of every group."""

    layers: list[UsedLayer]

    def __init__(self, layers: int, compression: Compression, store: RowStore | None = None) -> None:
        super().__init__([UsedLayer(compression.rate, store) for _ in range(layers)], compression)
        self.counted: Tensor | None = None

    def begin(self, incoming: Incoming) -> None:
        places = self.start(incoming)
        self.counted = incoming.real
        self.width = self.columns + incoming.queries
        if not places.gapless:
            wholes = self.compression.last(places.groups)
            self.key_positions = torch.cat([wholes, places.tokens, places.new], 1)

    def attended(self, layer: int, query: Tensor, keys: Tensor, view: View, scaling: float) -> None:
        """Score what the layer has seen, and reduce the groups that leave."""
        own = self.layers[layer]
        own.rescore(keys.detach(), Asked(query.detach(), view, scaling, self.counted))
        own.absorb(own.turn)

    def finish(self) -> None:
        super().finish()
        self.counted = None

    def crop(self, tokens_to_remove: int) -> None:
        raise TautError(NO_WAY_BACK)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"scores.{index}": layer.scores for index, layer in enumerate(self.layers)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        for index, layer in enumerate(self.layers):
            layer.scores = state[f"scores.{index}"]
