"""What a key-value cache of ours owes to the attention mask: where every entry stands in the text, and what it is."""

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

    ``ids`` (B, T), integer, are None where the caller gave vectors. ``real`` (B, T) bool is False for padding, None
    when nothing is padded; ``starts`` (B,) are the positions of the rows' first real tokens, None when all are 0.
    ``restarts`` (B or 1, T) bool is True where a packed sequence begins, None where nothing is packed. ``learned`` is
    what the memory's method learns in this model, if anything.
    """

    queries: int
    device: torch.device
    ids: Tensor | None = None
    real: Tensor | None = None
    starts: Tensor | None = None
    restarts: Tensor | None = None
    learned: nn.Module | None = None


class PositionedCache(DynamicCache, ABC):
    """Abstract: a cache that may drop entries, so that places in it are not positions in the text.

    The plug-in calls ``begin`` before each forward pass and ``finish`` after it. In between, ``key_positions``
    describes the keys that attention will see, (B or 1, S) int64 counted from each row's first real token, negative
    for an empty entry; None when they stand at 0 ... S - 1 of the text, padding included. ``starts`` (B,) are the
    positions of the rows' first real tokens, None when all are 0. ``marks`` are those of queries and keys, (B or 1, T)
    and (B or 1, S), where the memory's pattern is a Marked one.
    """

    key_positions: Tensor | None = None
    starts: Tensor | None = None
    marks: tuple[Tensor, Tensor] | None = None
    placed: ClassVar[bool] = True
    """Whether ``key_positions`` are true: else they say of earlier tokens only whether there is an entry."""

    @abstractmethod
    def begin(self, incoming: Incoming) -> None:
        """Announce the new tokens."""

    def attended(self, layer: int, query: Tensor, keys: Tensor, view: View, scaling: float) -> None:
        """The plug-in calls this after each self-attention: queries (B, H, T, K) have seen the keys (B, H', S, K) that
        ``update`` gave. Does nothing unless a cache wants to know."""

    @abstractmethod
    def finish(self) -> None:
        """The forward pass is over."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """What a file needs besides the keys and values of each layer, between two forward passes."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``, once the layers have their keys and values."""


def gathered(held: Tensor, index: Tensor) -> Tensor:
    """The columns ``index`` of ``held`` (B, H', S, K): (B or 1, C), or (B, H', C) where every head has its own."""
    if index.shape[0] == 1 and index.dim() == 2:
        return held.index_select(2, index[0])
    batch, heads, columns, width = held.shape
    first = torch.arange(0, batch * heads * columns, columns, device=held.device).view(batch, heads, 1)
    rows = first + (index if index.dim() == 3 else index[:, None])
    # A gather looks every single number up; this copies rows.
    return held.reshape(-1, width).index_select(0, rows.view(-1)).view(batch, heads, -1, width)
