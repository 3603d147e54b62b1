"""The base of taut's key/value caches: it gives the attention mask the text position and the mark of every entry."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from taut.ops.attention.masks import View


@dataclass(frozen=True)
class Incoming:
    """The T = ``queries`` new tokens of one forward pass.

    ``ids`` (B, T), integer, are None when the caller passed vectors. ``real`` (B, T) bool is False for padding, None
    when nothing is padded; ``starts`` (B,) are the positions of the rows' first real tokens, None when all are 0.
    ``restarts`` (B or 1, T) bool is True where a packed sequence begins, None when nothing is packed. ``learned`` is
    the module that the memory method trains in this model, None if it trains nothing.
    """

    queries: int
    device: torch.device
    ids: Tensor | None = None
    real: Tensor | None = None
    starts: Tensor | None = None
    restarts: Tensor | None = None
    learned: nn.Module | None = None


class PositionedCache(DynamicCache, ABC):
    """Abstract: a cache that may drop entries, so an entry's column is not its position in the text.

    The plug-in calls ``begin`` before each forward pass and ``finish`` after it. In between, ``key_positions``
    (B or 1, S) int64 are the positions of the keys that attention will see. They count from each row's first real
    token and are negative for an empty entry. None means positions 0 ... S - 1 of the text, padding included.
    ``starts`` (B,) are the positions of the rows' first real tokens, None when all are 0. If the memory's pattern is a
    ``Marked`` one, ``marks`` are the marks of the queries (B or 1, T) and of the keys (B or 1, S).
    """

    key_positions: Tensor | None = None
    starts: Tensor | None = None
    marks: tuple[Tensor, Tensor] | None = None
    placed: ClassVar[bool] = True
    """Whether ``key_positions`` are true positions. If not, they only show which earlier columns are empty."""

    @abstractmethod
    def begin(self, incoming: Incoming) -> None:
        """Prepare for a forward pass over the new tokens."""

    def attended(self, layer: int, query: Tensor, keys: Tensor, view: View, scaling: float) -> None:
        """Called by the plug-in after each self-attention, in which the queries (B, H, T, K) have seen the keys
        (B, H', S, K) that ``update`` returned. Does nothing by default."""

    @abstractmethod
    def finish(self) -> None:
        """Clean up after the forward pass."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """The tensors that a file needs between two forward passes, besides each layer's keys and values."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from ``state``. The layers must already hold their keys and values."""


def gathered(held: Tensor, index: Tensor) -> Tensor:
    """The columns ``index`` of ``held`` (B, H', S, K): (B or 1, C), or (B, H', C) if each head has its own."""
    if index.shape[0] == 1 and index.dim() == 2:
        return held.index_select(2, index[0])
    batch, heads, columns, width = held.shape
    first = torch.arange(0, batch * heads * columns, columns, device=held.device).view(batch, heads, 1)
    rows = first + (index if index.dim() == 3 else index[:, None])
    # ``gather`` would look up every single number; this copies whole rows.
    return held.reshape(-1, width).index_select(0, rows.view(-1)).view(batch, heads, -1, width)
