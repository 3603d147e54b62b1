"""A bounded key-value cache: the first tokens stay, the rest go round a ring.

Position p of a row (counted from its first real token) lives in column p below ``sinks``, else in column
``sinks + (p - sinks) % window``. So the place of every entry follows from the number of tokens seen, a full cache takes
a new token by overwriting one column, and a left-padded row holds exactly what the row alone would hold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.kernels.cache import Incoming, PositionedCache, gathered
from taut.kernels.stored import RowStore, StoredLayer, rounded


@dataclass(frozen=True)
class Ring:
    """The places, in closed form."""

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

    ``slot`` (B or 1,): overwrite this column. Else put them behind the old ones, attend to all, and keep the columns
    ``index`` (B or 1, C), or all where that is None.
    """

    queries: int
    slot: Tensor | None = None
    index: Tensor | None = None


class RingLayer(StoredLayer):
    """One layer's entries. ``seen`` counts all tokens; the last ``pending`` are not yet in the ring (recorded, because
    assisted decoding may take them back)."""

    def __init__(self, store: RowStore | None = None) -> None:
        super().__init__(store)
        self.turn: Turn | None = None
        self.seen = self.pending = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """(B, H', T, K) new keys and values -> (B, H', S, K), all that this pass attends to."""
        if self.turn is None:
            raise TautError("this cache drops entries, so it serves only the model whose recipe made it")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        turn = self.turn
        self.seen += turn.queries
        if turn.slot is not None:
            self.keys, keys = self._over(self.keys, key_states, turn)
            self.values, values = self._over(self.values, value_states, turn)
            return keys, values
        keys, values = super().update(key_states, value_states)
        if self.record_past:
            self.pending += turn.queries
        else:
            self.settle(turn.index)
        return keys, values

    def _over(self, held: Tensor, states: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """What is held once the one entry ``states`` is in its slot, and what that stands for."""
        held = _written(held, self.to_hold(states), turn)
        seen = self.to_attend(held, states)
        if self.store is not None and torch.is_grad_enabled():
            seen = _written(seen, rounded(states, self.store), turn)
        return held, seen

    def settle(self, index: Tensor | None) -> None:
        """Keep these columns of what is held."""
        self.pending = 0
        if index is not None:
            self.keys, self.values = gathered(self.keys, index), gathered(self.values, index)

    def get_seq_length(self) -> int:
        """Tokens seen, not entries held: positions stay the true ones."""
        return self.seen

    def reset(self) -> None:
        super().reset()
        self.turn, self.seen, self.pending = None, 0, 0


class RingCache(PositionedCache):
    """The first ``sinks`` tokens of each row and its latest ``window``: at most their sum, in each of ``layers``.

    Assisted decoding takes tokens back. That works when the cache is handed to ``generate`` empty (then it is told to
    record them); otherwise only until something was dropped, and raises TautError after that.
    """

    def __init__(self, layers: int, sinks: int, window: int, store: RowStore | None = None) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = [RingLayer(store) for _ in range(layers)], None
        self.ring = Ring(sinks, window)
        self.width = 0

    def begin(self, incoming: Incoming) -> None:
        layer, capacity = self.layers[0], self.ring.capacity
        queries, starts, device = incoming.queries, incoming.starts, incoming.device
        self.starts = starts
        settled = layer.seen - layer.pending
        fresh = layer.pending + queries
        earliest, latest = (0, 0) if starts is None else (int(starts.min()), int(starts.max()))
        columns = max(0, min(capacity, settled - earliest))
        if fresh == 1 and columns == capacity and latest <= settled and not layer.record_past:
            after = self._counts(settled + 1, device)
            turn = Turn(1, slot=self.ring.column(after - 1))
            self.key_positions = self.ring.held(after, columns)
        else:
            turn = Turn(queries, index=self._kept(settled, fresh, device))
            contiguous = settled == 0 or (starts is None and settled <= capacity)
            self.key_positions = None if contiguous else self._positions(settled, columns, fresh, device)
        self.width = columns + (0 if turn.slot is not None else fresh)
        for each in self.layers:
            each.turn = turn

    def finish(self) -> None:
        self.key_positions = None
        for each in self.layers:
            each.turn = None

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys in this forward pass, and 0."""
        return self.width, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, and let go of what was recorded for that."""
        layer, count = self.layers[0], abs(tokens_to_remove)
        kept = layer.pending - count
        if kept < 0 and (self.starts is not None or layer.seen > self.ring.capacity):
            raise TautError(
                f"crop({tokens_to_remove}): the cache has dropped what it would need to take {count} tokens back. For "
                "assisted decoding, pass an empty cache of this recipe as past_key_values"
            )
        settled = layer.seen - layer.pending
        index = self._kept(settled, kept, layer.device) if kept > 0 else None
        for each in self.layers:
            each.seen -= count
            if count:
                each.keys, each.values = each.keys[:, :, :-count], each.values[:, :, :-count]
            each.settle(index)

    def _counts(self, seen: int, device: torch.device) -> Tensor:
        """How many real tokens each row has among the first ``seen``: (B or 1,)."""
        if self.starts is None:
            return torch.tensor([seen], device=device)
        return (seen - self.starts.to(device)).clamp(min=0)

    def _positions(self, settled: int, columns: int, fresh: int, device: torch.device) -> Tensor:
        """Of ``columns`` columns of the ring and ``fresh`` tokens behind them: (B or 1, columns + fresh)."""
        first = torch.tensor([settled], device=device) - (0 if self.starts is None else self.starts.to(device))
        new = first[:, None] + torch.arange(fresh, device=device)
        return torch.cat([self.ring.held(self._counts(settled, device), columns), new], 1)

    def _kept(self, settled: int, fresh: int, device: torch.device) -> Tensor | None:
        """Where the ring finds its entries once ``fresh`` tokens behind it are taken in; None when all stay put."""
        total, capacity = settled + fresh, self.ring.capacity
        if self.starts is None and total <= capacity:
            return None
        earliest = 0 if self.starts is None else int(self.starts.min())
        columns = max(0, min(capacity, settled - earliest))
        position = self.ring.held(self._counts(total, device), max(0, min(capacity, total - earliest)))
        column = torch.arange(position.shape[1], device=device)
        first = settled - (0 if self.starts is None else self.starts.to(device)[:, None])
        is_new = position >= self._counts(settled, device)[:, None]
        return torch.where(is_new, columns + position - first, column)


def _written(held: Tensor, new: Tensor, turn: Turn) -> Tensor:
    """``held`` (B, H', C, K) with the one entry ``new`` in its slot: in place where nobody can be looking back."""
    slot = turn.slot.view(-1, 1, 1, 1).expand_as(new)
    if torch.is_grad_enabled() or (held.is_inference() and not torch.is_inference_mode_enabled()):
        return held.scatter(2, slot, new)
    return held.scatter_(2, slot, new)
