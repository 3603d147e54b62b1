"""A bounded key/value cache in which every head of every layer selects the entries it keeps.

A head drops the entries with the lowest scores. All heads hold equally many entries, so one mask fits all of them. The
mask shows which columns are empty. It holds no text positions, because these differ from head to head.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.attention.masks import WHOLE, View
from taut.ops.caches.base import Incoming, PositionedCache, gathered
from taut.ops.caches.quantized import RowStore, StoredLayer

WEIGHTS_AT_ONCE = 1 << 22
"""Attention weights computed at a time: bounds the memory that scoring the queries of a long prompt needs."""


@dataclass(frozen=True)
class Asked:
    """The queries (B, H, T, K) of a pass and the view under which they attended. ``counted`` (B, T) bool is False for
    padding, None when nothing is padded."""

    query: Tensor
    view: View
    scaling: float
    counted: Tensor | None = None


class Score(ABC):
    """Abstract: the worth of each entry, (B, H', S). The lowest are dropped, the older of two equal ones first."""

    dtype: ClassVar[torch.dtype]
    """The dtype in which scores are stored."""
    reads_queries: ClassVar[bool]

    @abstractmethod
    def first(self, keys: Tensor) -> Tensor:
        """(B, H', T, K) new keys -> their scores before any query has seen them, (B, H', T)."""

    def after(self, scores: Tensor, keys: Tensor, asked: Asked) -> Tensor:
        """The scores (B, H', S) after these queries have seen the ``keys`` (B, H', S, K)."""
        return scores


@dataclass(frozen=True)
class KeyNorm(Score):
    """The smaller the key's L2 norm, the higher the score. Rotary positions keep the norm, so one key has the same norm
    at every position, up to rounding. bfloat16 makes these norms equal, so the order does not depend on the last bit.
    """

    dtype: ClassVar[torch.dtype] = torch.bfloat16
    reads_queries: ClassVar[bool] = False

    def first(self, keys: Tensor) -> Tensor:
        return -torch.linalg.vector_norm(keys.float(), dim=-1).to(self.dtype)


@dataclass(frozen=True)
class AttentionMass(Score):
    """The attention that an entry has received, summed over the query heads of its key head: from all queries so far,
    or only from the ``last`` one of each row."""

    last: bool = False
    dtype: ClassVar[torch.dtype] = torch.float32
    reads_queries: ClassVar[bool] = True

    def first(self, keys: Tensor) -> Tensor:
        return keys.new_zeros(keys.shape[:-1], dtype=self.dtype)

    def after(self, scores: Tensor, keys: Tensor, asked: Asked) -> Tensor:
        if not self.last:
            return scores + self._mass(keys, asked, 0, asked.counted)
        queries, counted = asked.query.shape[2], asked.counted
        if counted is None:
            return self._mass(keys, asked, queries - 1, None)
        place = torch.arange(1, queries + 1, device=counted.device) * counted
        newest = place.amax(1, keepdim=True)
        mass = self._mass(keys, asked, max(0, int(newest.min()) - 1), (place == newest) & counted)
        return torch.where(newest[:, None] > 0, mass, scores)

    def _mass(self, keys: Tensor, asked: Asked, start: int, counted: Tensor | None) -> Tensor:
        """(B, H', S): the summed weights of queries ``start`` and later, without those not ``counted``."""
        batch, heads, columns, _ = keys.shape
        query, view = asked.query.unflatten(1, (heads, -1)), asked.view
        total = keys.new_zeros(batch, heads, columns, dtype=self.dtype)
        rows = max(1, WEIGHTS_AT_ONCE // (batch * asked.query.shape[1] * columns))
        for low in range(start, query.shape[3], rows):
            block = slice(low, low + rows)
            scores = query[:, :, :, block] @ keys[:, :, None].transpose(-1, -2) * asked.scaling
            hidden = ~view.block(block, WHOLE, keys.device)[:, :, None]
            weights = scores.float().masked_fill_(hidden, torch.finfo(torch.float32).min).softmax(-1)
            if counted is not None:
                weights *= counted[:, None, None, block, None]
            total += weights.sum((2, 3))
        return total


@dataclass(frozen=True)
class Cut:
    """Keep ``count`` of S columns: those that are ``safe`` (B or 1, S), and the best of the others. ``real`` (B, S) is
    False for empty columns, which fill the front of a row that has fewer entries; None when no column is empty."""

    count: int
    safe: Tensor
    real: Tensor | None

    def index(self, scores: Tensor) -> Tensor:
        """(B, H', S) scores -> the columns to keep, (B, H', ``count``), oldest first."""
        columns = scores.shape[-1]
        worth = scores.masked_fill(self.safe[:, None], torch.inf)
        if self.real is None and self.count == columns - 1:
            kept = torch.arange(self.count, device=scores.device)
            return kept + (kept >= worth.argmin(-1, keepdim=True))
        if self.real is not None:
            worth = worth.masked_fill(~self.real[:, None], -torch.inf)
        # Flipped, because a stable sort puts the first of equals in front, and here the newest must be first.
        order = worth.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., : self.count]
        kept = columns - 1 - order
        if self.real is not None:
            empty = ~self.real[:, None].expand_as(scores).gather(2, kept)
            kept = kept - columns * empty
        return kept.sort(-1).values % columns


class EvictionLayer(StoredLayer):
    """One layer's entries, each head's oldest first, with their ``scores`` (B, H', S)."""

    def __init__(self, score: Score, store: RowStore | None) -> None:
        super().__init__(store)
        self.score, self.ready, self.seen = score, False, 0
        self.scores: Tensor | None = None
        self.unconfirmed: list[Tensor] = []
        """Queries (B, H, T, K) of the tokens that may be taken back."""
        self.scaling = 1.0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """(B, H', T, K) new keys and values -> (B, H', S, K), all that this pass attends to."""
        if not self.ready:
            raise TautError("this cache drops entries, so it serves only the model whose recipe made it")
        keys, values = super().update(key_states, value_states)
        first = self.score.first(keys[:, :, -key_states.shape[2] :].detach())
        self.scores = first if self.scores is None else torch.cat([self.scores, first], 2)
        self.seen += key_states.shape[2]
        return keys, values

    @torch.no_grad()
    def rescore(self, keys: Tensor, asked: Asked) -> None:
        self.scores = self.score.after(self.scores, keys, asked)

    def evict(self, cut: Cut) -> None:
        index = cut.index(self.scores)
        self.scores = self.scores.gather(2, index)
        self.keys, self.values = gathered(self.keys, index), gathered(self.values, index)

    def forget(self, count: int) -> None:
        """Take the last ``count`` tokens back."""
        self.seen -= count
        if count:
            self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
            self.scores = self.scores[:, :, :-count]

    def take(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order, as was done with the keys."""
        if self.scores is not None:
            self.scores = self.scores[rows]
            self.unconfirmed = [query[rows] for query in self.unconfirmed]

    def get_seq_length(self) -> int:
        """How many tokens were seen, not how many entries are held, so that positions stay true."""
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.ready, self.seen, self.scores, self.unconfirmed = False, 0, None, []


class EvictionCache(PositionedCache):
    """Holds at most ``entries`` of each row in each head of ``layers`` layers, including the latest ``recent``.

    After a pass that leaves more, each head drops the entries with the lowest ``score``. A left-padded row holds the
    same entries as the row without padding. Assisted decoding takes tokens back. If ``generate`` receives the cache
    empty, the cache drops nothing before ``crop`` says which tokens stay. Otherwise ``crop`` raises TautError if tokens
    cannot be taken back exactly.
    """

    placed = False

    def __init__(self, layers: int, entries: int, recent: int, score: Score, store: RowStore | None = None) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = [EvictionLayer(score, store) for _ in range(layers)], None
        self.entries, self.recent, self.score = entries, recent, score
        self.recording = False
        self._forget()

    def _forget(self) -> None:
        self.columns = self.pending = 0
        self.dropped = False
        self.real: Tensor | None = None
        """(B, S) bool, False for columns that are padding or empty; None when none are."""
        self.cut: Cut | None = None
        self.counted: Tensor | None = None

    def activate_past_recording(self) -> None:
        self.recording = True

    def begin(self, incoming: Incoming) -> None:
        queries, device = incoming.queries, incoming.device
        self.starts, self.counted = incoming.starts, incoming.real
        if self.real is not None or incoming.real is not None:
            rows = len(incoming.real if self.real is None else self.real)
            old = _all(rows, self.columns, device) if self.real is None else self.real
            new = _all(rows, queries, device) if incoming.real is None else incoming.real
            self.real = torch.cat([old, new], 1)
        self.columns += queries
        self.key_positions = self._positions(queries, device) if self.dropped else None
        if self.recording:
            self.pending += queries
        else:
            self.cut = self._cut(device)
        for layer in self.layers:
            layer.ready = True

    def attended(self, layer: int, query: Tensor, keys: Tensor, view: View, scaling: float) -> None:
        """Score the entries that the queries have seen, then drop those above the limit."""
        attending = self.layers[layer]
        if self.recording and self.score.reads_queries:
            attending.unconfirmed.append(query.detach())
            attending.scaling = scaling
        elif self.score.reads_queries:
            attending.rescore(keys.detach(), Asked(query.detach(), view, scaling, self.counted))
        if self.cut is not None:
            attending.evict(self.cut)

    def finish(self) -> None:
        self._after_eviction()
        self.key_positions = self.counted = None
        for layer in self.layers:
            layer.ready = False

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of keys in this forward pass, and an offset of 0."""
        return self.columns, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, then drop the entries above the limit. Raises TautError if
        they cannot be taken back exactly."""
        count = abs(tokens_to_remove)
        confirmed = self.pending - count
        if confirmed < 0 and (self.dropped or self.score.reads_queries):
            raise TautError(
                f"crop({tokens_to_remove}): the cache cannot take {count} tokens back, {self.pending} are unconfirmed. "
                "For assisted decoding, pass an empty cache of this recipe as past_key_values"
            )
        self.columns -= count
        self.real = None if self.real is None else self.real[:, : self.columns]
        for layer in self.layers:
            layer.forget(count)
        if confirmed > 0:
            self._confirm(confirmed)
        self.pending = 0
        for layer in self.layers:
            layer.unconfirmed = []

    def state(self) -> dict[str, Tensor]:
        facts = {"seen": torch.tensor(self.layers[0].seen), "dropped": torch.tensor(self.dropped)}
        facts |= {} if self.real is None else {"real": self.real}
        return facts | {f"scores.{index}": layer.scores for index, layer in enumerate(self.layers)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.dropped, self.real = bool(state["dropped"]), state.get("real")
        self.columns = self.layers[0].keys.shape[2]
        for index, layer in enumerate(self.layers):
            layer.seen, layer.scores = int(state["seen"]), state[f"scores.{index}"]

    def reset(self) -> None:
        super().reset()
        self._forget()

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.layers[0].scores is not None:
            self._take(torch.arange(len(self.layers[0].scores)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def _take(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.take(rows if layer.scores is None else rows.to(layer.scores.device))
        self.real = None if self.real is None else self.real[rows.to(self.real.device)]

    def _confirm(self, confirmed: int) -> None:
        """Score and evict as ``attended`` would have done if these pending tokens had come in one pass."""
        first = self.layers[0]
        device, batch = first.scores.device, first.scores.shape[0]
        view = View(
            batch,
            confirmed,
            self.columns,
            query_start=first.seen - confirmed,
            causal=True,
            starts=self.starts,
            key_positions=self._positions(confirmed, device, first.seen - confirmed),
        )
        counted = None if self.real is None else self.real[:, -confirmed:]
        self.cut = self._cut(device)
        for layer in self.layers:
            if self.score.reads_queries:
                query = torch.cat(layer.unconfirmed, 2)[:, :, :confirmed]
                layer.rescore(layer.to_attend(layer.keys, query), Asked(query, view, layer.scaling, counted))
            if self.cut is not None:
                layer.evict(self.cut)
        self._after_eviction()

    def _positions(self, fresh: int, device: torch.device, first: int | None = None) -> Tensor:
        """The positions of all columns, (B or 1, S). The last ``fresh`` are new. Old ones get 0, before every query."""
        first = self.layers[0].seen if first is None else first
        start = torch.tensor([first], device=device) - (0 if self.starts is None else self.starts.to(device))
        new = start[:, None] + torch.arange(fresh, device=device)
        positions = torch.cat([new.new_zeros(new.shape[0], self.columns - fresh), new], 1)
        return positions if self.real is None else torch.where(self.real, positions, -1)

    def _cut(self, device: torch.device) -> Cut | None:
        """Which of the present columns to keep, None if none have to go."""
        if self.columns <= self.entries:
            return None
        if self.real is None:
            safe = torch.arange(self.columns, device=device)[None] >= self.columns - self.recent
            return Cut(self.entries, safe, None)
        age = self.real.flip(1).cumsum(1).flip(1)
        count = min(self.entries, int(age[:, 0].max()))
        return Cut(count, self.real & (age <= self.recent), self.real) if count < self.columns else None

    def _after_eviction(self) -> None:
        """Update the bookkeeping after all layers have made the cut."""
        if self.cut is None:
            return
        if self.real is not None:
            column = torch.arange(self.cut.count, device=self.real.device)
            self.real = column >= self.cut.count - self.real.sum(1, keepdim=True)
        self.columns, self.dropped, self.cut = self.cut.count, True, None


def _all(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.ones(rows, columns, dtype=torch.bool, device=device)
