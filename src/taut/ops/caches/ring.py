"""A bounded key/value cache: it keeps the first tokens, and the latest ones in a ring buffer.

Position p of a row (counted from its first real token) is stored in column p if p < ``sinks``, else in column
``sinks + (p - sinks) % window``. So the column of every entry follows from the number of tokens seen. A full cache
takes a new token by overwriting one column. A left-padded row holds the same entries as the row without padding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.caches.base import Incoming, gathered
from taut.ops.caches.counted import CountedCache, CountedLayer
from taut.ops.caches.quantized import RowStore, rounded


@dataclass(frozen=True)
class Ring:
    """The columns of positions and the positions in columns, in closed form."""

    sinks: int
    window: int

    @property
    def capacity(self) -> int:
        return self.sinks + self.window

    def column(self, position: Tensor) -> Tensor:
        """The column of each position."""
        return torch.where(position < self.sinks, position, self.sinks + (position - self.sinks) % self.window)

    def held(self, count: Tensor, columns: int) -> Tensor:
        """The positions in the first ``columns`` columns after ``count`` (B or 1,) tokens: (B or 1, columns), -1 for an
        empty column."""
        column = torch.arange(columns, device=count.device)
        laps = (count[:, None] - 1 - column).div(self.window, rounding_mode="floor")
        position = torch.where(column < self.sinks, column, column + laps * self.window)
        return torch.where(column < count[:, None], position, -1)


@dataclass(frozen=True)
class Turn:
    """What each layer does with the ``queries`` new entries of one forward pass.

    With ``slot`` (B or 1,), the one new entry overwrites this column. Without it, a layer appends the new entries,
    attends to all, and keeps the columns ``index`` (B or 1, C), or all when that is None.
    """

    queries: int
    slot: Tensor | None = None
    index: Tensor | None = None


class RingLayer(CountedLayer):
    """One layer's ring, followed by its pending tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """(B, H', T, K) new keys and values -> (B, H', S, K), all that this pass attends to."""
        if self.turn is None:
            raise TautError("this cache drops entries, so it serves only the model whose recipe made it")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        turn: Turn = self.turn
        self.seen += turn.queries
        if turn.slot is not None:
            self.keys, keys = self._over(self.keys, key_states, turn)
            self.values, values = self._over(self.values, value_states, turn)
            return keys, values
        keys, values = super().update(key_states, value_states)
        if self.record_past:
            self.pending += turn.queries
        else:
            self.absorb(turn.index)
        return keys, values

    def _over(self, held: Tensor, states: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """Write the one entry ``states`` into its slot -> the stored tensor, and the keys or values to attend to."""
        held = _written(held, self.to_hold(states), turn)
        seen = self.to_attend(held, states)
        if self.store is not None and torch.is_grad_enabled():
            seen = _written(seen, rounded(states, self.store), turn)
        return held, seen

    def absorb(self, kept: Tensor | None) -> None:
        """Keep the columns ``kept`` (B or 1, C), or all when it is None."""
        self.pending = 0
        if kept is not None:
            self.keys, self.values = gathered(self.keys, kept), gathered(self.values, kept)


class RingCache(CountedCache):
    """Each of ``layers`` layers keeps the first ``sinks`` tokens of a row and its latest ``window``, no more."""

    def __init__(self, layers: int, sinks: int, window: int, store: RowStore | None = None) -> None:
        super().__init__([RingLayer(store) for _ in range(layers)])
        self.ring = Ring(sinks, window)

    def begin(self, incoming: Incoming) -> None:
        first, capacity = self.layers[0], self.ring.capacity
        queries, starts, device = incoming.queries, incoming.starts, incoming.device
        self.starts = starts
        absorbed = first.seen - first.pending
        fresh = first.pending + queries
        latest = 0 if starts is None else int(starts.max())
        columns = self.columns
        if fresh == 1 and columns == capacity and latest <= absorbed and not first.record_past:
            after = self.counts(absorbed + 1, device)
            turn = Turn(1, slot=self.ring.column(after - 1))
            self.key_positions = self.ring.held(after, columns)
        else:
            turn = Turn(queries, index=self.kept(absorbed, fresh, device))
            contiguous = absorbed == 0 or (starts is None and absorbed <= capacity)
            self.key_positions = None if contiguous else self._positions(absorbed, columns, fresh, device)
        self.width = columns + (0 if turn.slot is not None else fresh)
        for layer in self.layers:
            layer.turn = turn

    @property
    def dropped(self) -> bool:
        return self.layers[0].seen > self.ring.capacity

    def kept(self, absorbed: int, fresh: int, device: torch.device) -> Tensor | None:
        """The present column of each entry that the ring keeps, (B or 1, C); None when all stay in place."""
        total, capacity = absorbed + fresh, self.ring.capacity
        if self.starts is None and total <= capacity:
            return None
        earliest = 0 if self.starts is None else int(self.starts.min())
        position = self.ring.held(self.counts(total, device), max(0, min(capacity, total - earliest)))
        column = torch.arange(position.shape[1], device=device)
        is_new = position >= self.counts(absorbed, device)[:, None]
        return torch.where(is_new, self.columns + position - self.since(absorbed, device)[:, None], column)

    def _positions(self, absorbed: int, columns: int, fresh: int, device: torch.device) -> Tensor:
        """Positions in ``columns`` ring columns and of the ``fresh`` tokens after them: (B or 1, columns + fresh)."""
        new = self.since(absorbed, device)[:, None] + torch.arange(fresh, device=device)
        return torch.cat([self.ring.held(self.counts(absorbed, device), columns), new], 1)


def _written(held: Tensor, new: Tensor, turn: Turn) -> Tensor:
    """``held`` (B, H', C, K) with the entry ``new`` in its slot. In place if autograd and inference mode allow it."""
    slot = turn.slot.view(-1, 1, 1, 1).expand_as(new)
    if torch.is_grad_enabled() or (held.is_inference() and not torch.is_inference_mode_enabled()):
        return held.scatter(2, slot, new)
    return held.scatter_(2, slot, new)
