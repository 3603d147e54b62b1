"""Which query sees which key, as data: patterns over positions, and the view passed to an attention function."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from taut.core.errors import TautError

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query, key) indices, broadcasting against each other -> bool: the mask function of transformers."""

WHOLE = slice(None)


class Pattern(ABC):
    """Abstract: which keys a query may see, by position. Subclasses are frozen and hashable."""

    @abstractmethod
    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """(..., Q) and (..., S) integer positions -> (..., Q, S) bool."""

    def pairs(self, length: int) -> int:
        """How many of the ``length`` x ``length`` pairs are allowed. Counted, unless a subclass has a formula."""
        positions = torch.arange(length)
        return sum(int(self.allowed(rows, positions).sum()) for rows in positions.split(1024))

    @property
    @abstractmethod
    def repeats_from(self) -> int:
        """From this position on, what a query sees depends only on the distance and on its position modulo ``period``,
        except for keys that are seen always or never. Blocks beyond it share masks."""

    @property
    def period(self) -> int:
        return 1

    @property
    def band(self) -> tuple[int, int] | None:
        """A sliding window and a number of first tokens that together contain all that a causal query sees, so that a
        block kernel has to read nothing else. None if the pattern has no such bounds."""
        return None


@dataclass(frozen=True)
class Causal(Pattern):
    """j <= i."""

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return key[..., None, :] <= query[..., :, None]

    def pairs(self, length: int) -> int:
        return length * (length + 1) // 2

    @property
    def repeats_from(self) -> int:
        return 0


@dataclass(frozen=True)
class Window(Pattern):
    """0 <= i - j < width when causal, else |i - j| < width: ``width`` positions to each side, itself included."""

    width: int
    causal: bool = True

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        distance = query[..., :, None] - key[..., None, :]
        return (distance >= 0) & (distance < self.width) if self.causal else distance.abs() < self.width

    def pairs(self, length: int) -> int:
        width = min(self.width, length)
        below = length * width - width * (width - 1) // 2
        return below if self.causal else 2 * below - length

    @property
    def repeats_from(self) -> int:
        return self.width


@dataclass(frozen=True)
class Global(Pattern):
    """The first ``count`` positions see all others and are seen by all. Combine with ``Causal`` in a decoder."""

    count: int

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return (query < self.count)[..., :, None] | (key < self.count)[..., None, :]

    def pairs(self, length: int) -> int:
        return length**2 - max(0, length - self.count) ** 2

    @property
    def repeats_from(self) -> int:
        return self.count


@dataclass(frozen=True)
class Sink(Pattern):
    """j <= i, and j < count or i - j < window: the first tokens and a sliding window."""

    count: int
    window: int

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        distance = query[..., :, None] - key[..., None, :]
        return (distance >= 0) & ((distance < self.window) | (key < self.count)[..., None, :])

    def pairs(self, length: int) -> int:
        return Window(self.window).pairs(length) + self.beyond(length)

    def beyond(self, length: int) -> int:
        """Pairs with one of the first ``count`` keys that lie outside the window."""
        longest = max(0, length - self.window)
        count = min(self.count, longest)
        return count * longest - count * (count - 1) // 2

    @property
    def repeats_from(self) -> int:
        return self.count + self.window

    @property
    def band(self) -> tuple[int, int]:
        return self.window, self.count


class Marked(Pattern):
    """Abstract: a causal pattern that also depends on what the tokens are. Each token has a *mark*, an integer that
    follows from the text alone. ``View.marks`` holds the marks."""

    @abstractmethod
    def between(self, query: Tensor, key: Tensor) -> Tensor:
        """(..., Q) and (..., S) marks -> (..., Q, S) bool, without causality."""

    def sections(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor] | None:
        """Marks (B or 1, T) and (B or 1, S), oldest first -> (B or 1, T) int64, the key at which each query's section
        begins, and (B or 1, S) bool, the keys that later sections may see too. A block kernel has to read no other
        keys. None if the pattern has no sections."""
        return None

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        return Causal().allowed(query, key)


@dataclass(frozen=True)
class AnyOf(Pattern):
    """What at least one of ``members`` allows."""

    members: tuple[Pattern, ...]

    @property
    def repeats_from(self) -> int:
        return max(member.repeats_from for member in self.members)

    @property
    def period(self) -> int:
        return math.lcm(*(member.period for member in self.members))

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        seen = self.members[0].allowed(query, key)
        for member in self.members[1:]:
            seen = seen | member.allowed(query, key)
        return seen


@dataclass(frozen=True, eq=False)
class View:
    """Which query sees which key in one attention call: the information of a mask, without the T x S tensor.

    The T = ``queries`` have the positions ``query_start``, ... The S = ``keys`` have the positions ``key_start``, ...
    or, if a cache has gaps, ``key_positions`` (B or 1, S): counted from each row's first real token, negative for an
    empty entry. ``placed`` is False if such a cache knows only which entries exist, not their positions. Calls that
    need positions (``distances``, a mask with a ``rule`` or a further pattern) then raise TautError.
    ``padding`` (B, S) bool is True for real tokens, None when all are. ``starts`` (B,) are the positions of the first
    real tokens, None when all are 0. Patterns count from there, so a left-padded row equals the row without padding.
    ``causal``: j <= i. ``rule`` holds further limits of the model (packed sequences, its own sliding window), causality
    included. ``packed`` (B or 1, T) are positions that restart in each packed sequence; patterns count by them.
    ``pattern`` is that of the memory, ANDed with all of this. If it is a ``Marked`` one, ``marks`` are the marks of the
    queries (B or 1, T) and keys (B or 1, S). ``dense_mask`` makes the mask that the model would have used by itself:
    (B, 1, T, S) bool or float, or None. ``memo`` keeps masks that layers share.
    """

    batch: int
    queries: int
    keys: int
    query_start: int = 0
    key_start: int = 0
    causal: bool = False
    padding: Tensor | None = None
    starts: Tensor | None = None
    key_positions: Tensor | None = None
    placed: bool = True
    packed: Tensor | None = None
    pattern: Pattern | None = None
    marks: tuple[Tensor, Tensor] | None = None
    rule: Rule | None = None
    dense_mask: Callable[[], Tensor | None] | None = None
    memo: dict[Hashable, object] = field(default_factory=dict, repr=False)

    ndim = 4
    """Generation with a static cache makes the mask before the model runs, and reads ``ndim`` and ``contiguous``."""

    def contiguous(self) -> "View":
        return self

    @property
    def plain(self) -> bool:
        """Whether the model's own mask is enough: no memory pattern and no gaps."""
        return self.pattern is None and self.key_positions is None

    def dense(self, device: torch.device, pattern: Pattern | None = None) -> Tensor | None:
        """The mask as a tensor, True = may see: (B or 1, 1, T, S) bool, or None when no mask is needed beyond the
        ``is_causal`` flag (which applies to more than one query). ``pattern`` is ANDed with the view."""
        key = ("dense", pattern, device)
        if key not in self.memo:
            if self.plain and pattern is None and self.dense_mask is not None:
                self.memo[key] = self.dense_mask()
            elif self.plain and pattern is None and self._unmasked:
                self.memo[key] = None
            else:
                mask = self.block(WHOLE, WHOLE, device, pattern)
                # One query that sees everything: the fused kernels are faster without a mask.
                self.memo[key] = None if self.queries == 1 and bool(mask.all()) else mask
        return self.memo[key]

    def block(
        self, rows: slice, columns: slice | Tensor, device: torch.device, pattern: Pattern | None = None
    ) -> Tensor:
        """The part of the mask for these queries and keys: (B or 1, 1, t, s) bool. Keys may be (B or 1, s) indices."""
        if pattern is not None or self.rule is not None:
            self._need_places()
        query = self._shifted(torch.arange(self.queries, device=device)[rows] + self.query_start)
        key = _at(self._keys(device), columns)
        seen = key[..., None, :] >= 0 if self.key_positions is not None else torch.ones((), dtype=torch.bool).to(device)
        if self.causal and self.rule is None:
            seen = seen & Causal().allowed(query, key)
        for each in (self.pattern, pattern):
            if each is not None and self.packed is not None:
                seen = seen & each.allowed(self.packed[:, rows], _at(self.packed, columns))
            elif each is not None:
                seen = seen & each.allowed(query, key)
        if self.marks is not None:
            seen = seen & self.pattern.between(self.marks[0][:, rows], _at(self.marks[1], columns))
        if self.padding is not None:
            seen = seen & _at(self.padding.to(device), columns)[:, None]
        if self.rule is not None:
            seen = seen & self._ruled(query, key)
        seen = seen if seen.dim() == 3 else seen.expand(1, query.shape[-1], key.shape[-1])
        return seen.expand(-1, query.shape[-1], key.shape[-1])[:, None]

    def distances(self, device: torch.device) -> Tensor:
        """Position of the key minus position of the query, (B or 1, T, S); arbitrary for empty entries."""
        self._need_places()
        query = self._shifted(torch.arange(self.queries, device=device) + self.query_start)
        return self._keys(device)[:, None, :] - query[:, :, None]

    def reach(self, count: int) -> int:
        """How many leading keys hold the first ``count`` real tokens of every row."""
        return min(self.keys, count + self._latest_start) if count else 0

    def padded(self, columns: slice) -> bool:
        """Whether any row has padding among these keys."""
        if self.padding is None:
            return False
        return self._pads[columns.stop] > self._pads[columns.start]

    @cached_property
    def _pads(self) -> list[int]:
        """How many of the first k keys are padding in some row, for k = 0 ... S. Costs one device synchronisation."""
        return [0, *(~self.padding).any(0).cumsum(0).tolist()]

    @cached_property
    def _latest_start(self) -> int:
        return 0 if self.starts is None else int(self.starts.max())

    @property
    def _unmasked(self) -> bool:
        square = self.queries == self.keys or self.queries == 1
        aligned = self.query_start + self.queries == self.key_start + self.keys
        return self.padding is None and self.rule is None and (not self.causal or (square and aligned))

    def _need_places(self) -> None:
        if not self.placed and self.key_positions is not None:
            raise TautError(
                "every head of this cache holds different tokens, so windows and distances cannot be measured: use it "
                "with full attention (no attention.local_global or relative, no window of the model's own)"
            )

    def _keys(self, device: torch.device) -> Tensor:
        if self.key_positions is not None:
            return self.key_positions.to(device)
        return self._shifted(torch.arange(self.keys, device=device) + self.key_start)

    def _shifted(self, positions: Tensor) -> Tensor:
        """Positions counted from each row's first real token: (Q,) -> (B or 1, Q)."""
        return positions[None] if self.starts is None else positions[None] - self.starts.to(positions.device)[:, None]

    def _ruled(self, query: Tensor, key: Tensor) -> Tensor:
        offset = 0 if self.starts is None else self.starts.to(query.device)[:, None]
        query, key = (query + offset)[:, None, :, None], (key + offset).clamp(min=0)[:, None, None, :]
        rows = torch.arange(self.batch, device=query.device)[:, None, None, None]
        return self.rule(rows, torch.zeros_like(rows[:1]), query, key)[:, 0]


def _at(each: Tensor, columns: slice | Tensor) -> Tensor:
    """(B or 1, S) at a slice of its columns, or at the indices (B or 1, s): (B or 1, s)."""
    if isinstance(columns, slice):
        return each[..., columns]
    rows = max(len(each), len(columns))
    return each.expand(rows, -1).gather(1, columns.expand(rows, -1))
