"""What a key-value cache of ours owes to the attention mask: the true position of every entry."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from transformers import DynamicCache


class PositionedCache(DynamicCache, ABC):
    """Abstract: a cache that may drop entries, so that places in it are not positions in the text.

    The plug-in calls ``begin`` before each forward pass and ``finish`` after it. In between, ``key_positions``
    describes the keys that attention will see, (B or 1, S) int64 counted from each row's first real token, negative
    for an empty entry; None when they stand at 0 ... S - 1 of the text, padding included. ``starts`` (B,) are the
    positions of the rows' first real tokens, None when all are 0.
    """

    key_positions: Tensor | None = None
    starts: Tensor | None = None

    @abstractmethod
    def begin(self, queries: int, starts: Tensor | None, device: torch.device) -> None:
        """Announce ``queries`` new tokens, and where the rows' first real tokens stand."""

    @abstractmethod
    def finish(self) -> None:
        """The forward pass is over."""
