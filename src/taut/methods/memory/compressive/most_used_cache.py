"""Of a group of older entries only one is kept: in every head the one that received the most attention on average.

Attention is known only after a pass. So a pass sees all entries kept before it and its own tokens. Groups that have
left the memory by the end of the pass are reduced after it.
"""

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.attention.masks import View
from taut.ops.caches.base import Incoming, gathered
from taut.ops.caches.eviction import Asked, AttentionMass
from taut.ops.caches.quantized import RowStore
from taut.ops.caches.queues import Compression, Intake, QueueCache, QueueLayer

NO_WAY_BACK = (
    "pool = 'most_used' cannot take tokens back, as assisted decoding does: their attention is already counted"
)
MASS = AttentionMass()


class UsedLayer(QueueLayer):
    """The entries of one layer and their ``scores`` (B, H', S): the attention each received, summed over queries."""

    def __init__(self, rate: int, store: RowStore | None) -> None:
        super().__init__(rate, store)
        self.scores: Tensor | None = None

    def activate_past_recording(self) -> None:
        raise TautError(NO_WAY_BACK)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Add (B, H', T, K) new keys and values -> (B, H', S, K), all that this pass attends to."""
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
            keys, values, scores = (
                torch.cat([tensor, gathered(tensor, chosen)], 2) for tensor in (keys, values, scores)
            )
        self.scores = (scores if kept.index is None else gathered(scores, kept.index))[..., 0]
        self.keep(kept, keys, values)

    def _chosen(self, kept: Intake) -> Tensor:
        """Return the column of the most used entry of every group, (B, H', G); the first of equals."""
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
    """Keeps the recent entries of ``layers`` layers, and before them the most used entry of every group."""

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
        """Score the entries of the layer, and reduce the groups that leave the memory."""
        entries = self.layers[layer]
        entries.rescore(keys.detach(), Asked(query.detach(), view, scaling, self.counted))
        entries.absorb(entries.turn)

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
