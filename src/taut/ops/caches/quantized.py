"""Keys and values in few bits: a cache keeps packed rows, and attention sees the rounded numbers they stand for.

A row is the key or the value of one token in one head. Packed rows have the shape (B, H', S, bytes), like the keys they
stand for, so code that moves the columns or rows of a cache moves packed ones too. New tokens are rounded before their
own pass attends to them. So attention always sees the stored numbers, however the text was split into passes.
"""

from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from taut.core.errors import TautError


class RowStore(Protocol):
    """How rows of numbers are packed. See ``methods.store.Store``."""

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]: ...

    def pack(self, value: Tensor) -> Tensor: ...

    def lookup(self, packed: Tensor, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor: ...


def packed(states: Tensor, store: RowStore) -> Tensor:
    """(B, H', T, K) floating -> (B, H', T, bytes) uint8. Raises TautError for numbers that are not finite."""
    try:
        return store.pack(states.detach()).view(*states.shape[:-1], -1)
    except TautError:
        if states.isfinite().all():
            raise
        raise TautError(
            f"keys or values of {states.dtype} that are not finite cannot be kept in few bits: run the model in a "
            "wider dtype"
        ) from None


def expanded(held: Tensor, store: RowStore, width: int, dtype: torch.dtype) -> Tensor:
    """(B, H', S, bytes) uint8 -> (B, H', S, ``width`` = K) of ``dtype``, computed in float32."""
    shape = *held.shape[:-1], width
    rows = held.reshape(store.packed_shape(shape))
    # Where a fused lookup exists, looking up every row is several times faster than the plain formula.
    return store.lookup(rows, torch.arange(rows.shape[0], device=rows.device), width, dtype).view(shape)


def rounded(states: Tensor, store: RowStore) -> Tensor:
    """(B, H', T, K) -> the same after packing and expanding. The gradient passes as if nothing had been rounded."""
    there_and_back = expanded(packed(states, store), store, states.shape[-1], states.dtype)
    if torch.is_grad_enabled() and states.requires_grad:
        return states + (there_and_back - states).detach()
    return there_and_back


class StoredLayer(DynamicLayer):
    """Abstract: one layer of a cache, whose ``keys`` and ``values`` are packed if it has a ``store``.

    With a ``store``, gradients reach the new tokens of a pass but not the entries that are already packed.
    """

    def __init__(self, store: RowStore | None = None) -> None:
        super().__init__()
        self.store = store

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.store is not None:
            self.keys = self.values = torch.empty(0, dtype=torch.uint8, device=self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append (B, H', T, K) new keys and values -> all of them, (B, H', S, K)."""
        if self.store is None:
            return super().update(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, keys = self._behind(self.keys, key_states)
        self.values, values = self._behind(self.values, value_states)
        return keys, values

    def to_hold(self, states: Tensor) -> Tensor:
        """(B, H', T, K) -> the form in which ``keys`` and ``values`` are stored."""
        return states if self.store is None else packed(states, self.store)

    def to_attend(self, held: Tensor, like: Tensor) -> Tensor:
        """Stored (B, H', S, -) -> (B, H', S, K), with the width and dtype of ``like``."""
        return held if self.store is None else expanded(held, self.store, like.shape[-1], like.dtype)

    def _behind(self, held: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Append ``states`` -> the stored tensor, and the keys or values to attend to."""
        together = torch.cat([held, self.to_hold(states)], 2) if held.numel() else self.to_hold(states)
        if not (torch.is_grad_enabled() and states.requires_grad):
            return together, self.to_attend(together, states)
        new = rounded(states, self.store)
        return together, torch.cat([self.to_attend(held, states), new], 2) if held.numel() else new


class WholeLayer(StoredLayer):
    """A layer that drops nothing."""


class StoredCache(DynamicCache):
    """All keys and values of ``layers`` layers, each row packed by ``store``."""

    def __init__(self, layers: int, store: RowStore) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = [WholeLayer(store) for _ in range(layers)], None
