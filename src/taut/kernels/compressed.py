"""Two queues: recent entries as they came, and older ones compressed, several into one.

Tokens are counted in groups of ``rate``. A group that has left the memory is replaced by one entry, the mean or the
maximum of its keys and of its values, with the position of its last token. Keys are compressed as they are cached, so
with their rotary positions already in them. How far the queues have moved follows from the number of tokens read.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.kernels.cache import Incoming, gathered
from taut.kernels.counted import CountedCache, CountedLayer
from taut.kernels.patterns import Marked

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda groups: groups.mean(3),
    "max": lambda groups: groups.amax(3),
}
"""From (B, H', G, rate, K) to (B, H', G, K)."""


@dataclass(frozen=True)
class Compression(Marked):
    """A token sees its segment, at least ``memory`` tokens before that, and the latest ``compressed`` groups of those
    before.

    The mark of a query is how many groups have been compressed by then; that of a key is twice its group, plus 1 where
    it stands for all of it.
    """

    segment: int
    memory: int
    compressed: int
    rate: int

    def groups(self, count: Tensor) -> Tensor:
        """How many whole groups lie before the memory of the token at position ``count``."""
        evicted = (count - count % self.segment - self.memory).clamp(min=0)
        return evicted.div(self.rate, rounding_mode="floor")

    def between(self, query: Tensor, key: Tensor) -> Tensor:
        query, group, whole = query[..., :, None], (key >> 1)[..., None, :], (key & 1 == 1)[..., None, :]
        older = group < query
        return torch.where(whole, older & (group >= query - self.compressed), ~older)

    @property
    def most(self) -> int:
        """Entries that a token can see at most, itself included."""
        return self.segment + self.memory + self.rate - 1 + self.compressed

    @property
    def settled(self) -> int:
        return 0


@dataclass(frozen=True)
class Intake:
    """What each layer does with new entries behind those it holds: compress those in the columns ``members`` (B or 1,
    G rate) into G more, None where G is 0, and keep of all that the columns ``index`` (B or 1, C), None for every one.
    The first ``compressed`` of those kept are compressed ones."""

    compressed: int
    members: Tensor | None = None
    index: Tensor | None = None


class CompressedLayer(CountedLayer):
    """One layer's entries: ``compressed`` that stand for groups, then tokens, both oldest first."""

    def __init__(self, rate: int, pool: str) -> None:
        super().__init__()
        self.rate, self.pool, self.compressed = rate, pool, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """(B, H', T, K) new keys and values -> (B, H', S, K), all that this pass attends to."""
        if self.turn is None:
            raise TautError("this cache compresses entries, so it serves only the model whose recipe made it")
        self.seen += key_states.shape[2]
        super().update(key_states, value_states)
        if self.record_past:
            self.pending += key_states.shape[2]
            return self._with_groups(self.turn)
        return self._settled(self.turn)

    def settle(self, kept: Intake | None) -> None:
        self.pending = 0
        if kept is not None:
            self._settled(kept)

    def _settled(self, intake: Intake) -> tuple[Tensor, Tensor]:
        keys, values = self._with_groups(intake)
        self.compressed = intake.compressed
        if intake.index is not None:
            self.keys, self.values = gathered(keys, intake.index), gathered(values, intake.index)
        return keys, values

    def _with_groups(self, intake: Intake) -> tuple[Tensor, Tensor]:
        """What is held, and behind it the groups that are complete by now."""
        if intake.members is None:
            return self.keys, self.values
        keys, values = (
            torch.cat([held, POOLS[self.pool](gathered(held, intake.members).unflatten(2, (-1, self.rate)))], 2)
            for held in (self.keys, self.values)
        )
        return keys, values

    def reset(self) -> None:
        super().reset()
        self.compressed = 0


class CompressedCache(CountedCache):
    """In each of ``layers`` at most ``compression.most`` entries."""

    def __init__(self, layers: int, compression: Compression, pool: str) -> None:
        super().__init__([CompressedLayer(compression.rate, pool) for _ in range(layers)])
        self.compression = compression

    def begin(self, incoming: Incoming) -> None:
        if incoming.restarts is not None:
            raise TautError("packed sequences would be compressed together: give each a row of its own")
        layer, queries, device = self.layers[0], incoming.queries, incoming.device
        self.starts = incoming.starts
        settled, fresh = layer.seen - layer.pending, layer.pending + queries
        intake = self.kept(settled, fresh, device)
        rate, first = self.compression.rate, self.since(settled, device)[:, None]
        before, after = (self._counts_and_groups(seen, device)[1] for seen in (settled, settled + fresh))
        groups, tokens = self._held(settled, device)
        new = first + torch.arange(fresh, device=device)
        count = 0 if intake.members is None else intake.members.shape[1] // rate
        formed = before + torch.arange(count, device=device)
        formed = torch.where(formed < after, formed, -1)
        self.width = self.columns + fresh + count
        if self.starts is not None or groups.shape[1] or count:
            wholes = [torch.where(each < 0, -1, each * rate + rate - 1) for each in (groups, formed)]
            self.key_positions = torch.cat([wholes[0], tokens, new, wholes[1]], 1)
            parts = [each.div(rate, rounding_mode="floor") * 2 for each in (tokens, new)]
            marks = torch.cat([groups * 2 + 1, *parts, formed * 2 + 1], 1)
            self.marks = self.compression.groups(new[:, -queries:].clamp(min=0)), marks
        for each in self.layers:
            each.turn = intake

    def state(self) -> dict[str, Tensor]:
        return super().state() | {"compressed": torch.tensor(self.layers[0].compressed)}

    def restore(self, state: dict[str, Tensor]) -> None:
        super().restore(state)
        for layer in self.layers:
            layer.compressed = int(state["compressed"])

    @property
    def dropped(self) -> bool:
        return bool(self.compression.groups(torch.tensor(self.layers[0].seen)) > 0)

    def kept(self, settled: int, fresh: int, device: torch.device) -> Intake:
        """Which groups are complete after these tokens, and where the entries are that stay."""
        rate, old, columns = self.compression.rate, self.layers[0].compressed, self.columns
        first = self.since(settled, device)[:, None]
        held, before = self._counts_and_groups(settled, device)
        total, after = self._counts_and_groups(settled + fresh, device)
        count = int((after - before).max())
        if not count and self.starts is None:
            return Intake(old)

        def column(token: Tensor) -> Tensor:
            """Where the token at this position is, any column where there is none."""
            place = torch.where(token < held, old + token - before * rate, columns + token - first)
            return place.clamp(0, columns + fresh - 1)

        within = torch.arange(rate, device=device)
        formed = (before + torch.arange(count, device=device))[..., None] * rate + within
        compressed = min(self.compression.compressed, int(after.max()))
        group = after - compressed + torch.arange(compressed, device=device)
        place = torch.where(group < before, old + group - before, columns + fresh + group - before).clamp(min=0)
        token = after * rate + torch.arange(int((total - after * rate).max()), device=device)
        return Intake(compressed, column(formed.flatten(1)) if count else None, torch.cat([place, column(token)], 1))

    def _held(self, settled: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The groups (B or 1, G) and the tokens (B or 1, C) in the columns of every layer, -1 for an empty one."""
        old = self.layers[0].compressed
        count, before = self._counts_and_groups(settled, device)
        groups = before - old + torch.arange(old, device=device)
        tokens = before * self.compression.rate + torch.arange(self.columns - old, device=device)
        return groups.clamp(min=-1), torch.where(tokens < count, tokens, -1)

    def _counts_and_groups(self, seen: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The real tokens of each row among the first ``seen``, and how many groups of them are compressed: (B or 1, 1)
        each."""
        count = self.counts(seen, device)[:, None]
        return count, self.compression.groups(count)
