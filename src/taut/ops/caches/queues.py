"""A cache of two queues: recent entries, unchanged, and older entries that each stand for a group of tokens.

Tokens are counted in groups of ``rate``. A group that has left the memory is replaced by one compressed entry, with the
position of its last token. The number of tokens read determines how far the queues have moved.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.attention.masks import Marked
from taut.ops.caches.base import Incoming, gathered
from taut.ops.caches.counted import CountedCache, CountedLayer
from taut.ops.caches.quantized import RowStore

FOREIGN = "this cache compresses entries, so it serves only the model whose recipe made it"


@dataclass(frozen=True)
class Compression(Marked):
    """A token sees its segment, at least ``memory`` tokens before that, and the latest ``compressed`` older groups.

    The mark of a query is the number of groups compressed by then. The mark of a key is twice the number of its group,
    plus 1 if the key stands for the whole group.
    """

    segment: int
    memory: int
    compressed: int
    rate: int

    def groups(self, count: Tensor) -> Tensor:
        """How many whole groups lie before the memory of the token at position ``count``."""
        evicted = (count - count % self.segment - self.memory).clamp(min=0)
        return evicted.div(self.rate, rounding_mode="floor")

    def last(self, group: Tensor) -> Tensor:
        """The position of the last token of each group, -1 where the number of the group is negative."""
        return torch.where(group < 0, -1, group * self.rate + self.rate - 1)

    def between(self, query: Tensor, key: Tensor) -> Tensor:
        query, group, whole = query[..., :, None], (key >> 1)[..., None, :], (key & 1 == 1)[..., None, :]
        older = group < query
        return torch.where(whole, older & (group >= query - self.compressed), ~older)

    @property
    def most(self) -> int:
        """The most entries that a token can see, itself included."""
        return self.segment + self.memory + self.rate - 1 + self.compressed

    @property
    def repeats_from(self) -> int:
        return 0


@dataclass(frozen=True)
class Intake:
    """What each layer does once the new entries are appended.

    It compresses the entries in the columns ``members`` (B or 1, G rate) into G more and appends these; None if G is 0.
    Then it keeps the columns ``index`` (B or 1, C), or all if None. The first ``compressed`` of the kept entries are
    compressed ones. ``ages`` (B or 1, G rate) is how many tokens have come since each member, itself included."""

    compressed: int
    members: Tensor | None = None
    index: Tensor | None = None
    ages: Tensor | None = None


@dataclass(frozen=True)
class QueuePlaces:
    """What the columns hold in one pass, (B or 1, ...) int64 each, and whether earlier tokens are complete.

    ``groups`` and ``tokens`` are those held from earlier passes, -1 for an empty column. ``new`` are the new tokens,
    pending ones included, below 0 for padding. ``formed`` are the groups that are compressed by the end of the pass,
    -1 for none. ``gapless``: all earlier tokens are held, in the order of the text.
    """

    groups: Tensor
    tokens: Tensor
    new: Tensor
    formed: Tensor
    gapless: bool


class QueueLayer(CountedLayer, ABC):
    """Abstract: one layer's entries: ``compressed`` ones that stand for groups, then tokens, both oldest first."""

    def __init__(self, rate: int, store: RowStore | None) -> None:
        super().__init__(store)
        self.rate, self.compressed = rate, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H', T, K) new keys and values -> all of them, (B, H', S, K)."""
        if self.turn is None:
            raise TautError(FOREIGN)
        self.seen += key_states.shape[2]
        return super().update(key_states, value_states)

    def keep(self, intake: Intake, keys: Tensor, values: Tensor) -> None:
        """Hold those of these stored columns that ``intake`` keeps."""
        if intake.index is not None:
            keys, values = gathered(keys, intake.index), gathered(values, intake.index)
        self.keys, self.values, self.compressed = keys, values, intake.compressed

    def reset(self) -> None:
        super().reset()
        self.compressed = 0


class QueueCache(CountedCache, ABC):
    """Abstract: a cache that holds at most ``compression.most`` entries in each layer between two passes."""

    layers: list[QueueLayer]

    def __init__(self, layers: list[QueueLayer], compression: Compression) -> None:
        super().__init__(layers)
        self.compression = compression

    @abstractmethod
    def begin(self, incoming: Incoming) -> None: ...

    def start(self, incoming: Incoming) -> QueuePlaces:
        """Set every layer's ``turn`` -> what the columns hold in this pass. Raises TautError for packed sequences."""
        if incoming.restarts is not None:
            raise TautError("packed sequences would be compressed together: give each a row of its own")
        layer, device = self.layers[0], incoming.device
        self.starts = incoming.starts
        absorbed, fresh = layer.seen - layer.pending, layer.pending + incoming.queries
        intake = self.kept(absorbed, fresh, device)
        for queue in self.layers:
            queue.turn = intake
        new = self.since(absorbed, device)[:, None] + torch.arange(fresh, device=device)
        before, after = (self._counts_and_groups(seen, device)[1] for seen in (absorbed, absorbed + fresh))
        count = 0 if intake.members is None else intake.members.shape[1] // self.compression.rate
        formed = before + torch.arange(count, device=device)
        gapless = self.starts is None and self.columns == absorbed and not layer.compressed
        return QueuePlaces(*self._held(absorbed, device), new, torch.where(formed < after, formed, -1), gapless)

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"compressed": torch.tensor(self.layers[0].compressed)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        for layer in self.layers:
            layer.compressed = int(state["compressed"])

    @property
    def dropped(self) -> bool:
        return bool(self.compression.groups(torch.tensor(self.layers[0].seen)) > 0)

    def kept(self, absorbed: int, fresh: int, device: torch.device) -> Intake:
        """Which groups become complete with these tokens, and the columns of the entries that stay."""
        rate, old, columns = self.compression.rate, self.layers[0].compressed, self.columns
        first = self.since(absorbed, device)[:, None]
        held, before = self._counts_and_groups(absorbed, device)
        total, after = self._counts_and_groups(absorbed + fresh, device)
        count = int((after - before).max())
        if not count and self.starts is None:
            return Intake(old)

        def column(token: Tensor) -> Tensor:
            """The column of the token at this position, or any column if there is no such token."""
            place = torch.where(token < held, old + token - before * rate, columns + token - first)
            return place.clamp(0, columns + fresh - 1)

        within = torch.arange(rate, device=device)
        formed = ((before + torch.arange(count, device=device))[..., None] * rate + within).flatten(1)
        compressed = min(self.compression.compressed, int(after.max()))
        group = after - compressed + torch.arange(compressed, device=device)
        place = torch.where(group < before, old + group - before, columns + fresh + group - before).clamp(min=0)
        token = after * rate + torch.arange(int((total - after * rate).max()), device=device)
        index = torch.cat([place, column(token)], 1)
        if not count:
            return Intake(compressed, index=index)
        return Intake(compressed, column(formed), index, (total - formed).clamp(min=1))

    def _held(self, absorbed: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The groups (B or 1, G) and the tokens (B or 1, C) in the columns of every layer, -1 for an empty one."""
        old = self.layers[0].compressed
        count, before = self._counts_and_groups(absorbed, device)
        groups = before - old + torch.arange(old, device=device)
        tokens = before * self.compression.rate + torch.arange(self.columns - old, device=device)
        return groups.clamp(min=-1), torch.where(tokens < count, tokens, -1)

    def _counts_and_groups(self, seen: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The real tokens of each row among the first ``seen``, and how many groups of them are compressed: (B or 1, 1)
        each."""
        count = self.counts(seen, device)[:, None]
        return count, self.compression.groups(count)
