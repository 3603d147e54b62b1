"""Bounded caches in which the number of tokens seen alone determines the position of every entry.

So no positions have to be stored. Rows may be reordered, repeated and selected. A left-padded row holds the same
entries as the row without padding. A prompt may be split anywhere.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.caches.base import PositionedCache
from taut.ops.caches.quantized import RowStore, StoredLayer


class CountedLayer(StoredLayer, ABC):
    """Abstract: one layer's entries. ``seen`` counts all tokens. The last ``pending`` ones are held unchanged after the
    others, because assisted decoding may take them back. ``turn`` says what the current pass does with its new
    entries."""

    def __init__(self, store: RowStore | None = None) -> None:
        super().__init__(store)
        self.turn: Any = None
        self.seen = self.pending = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        """How many tokens were seen, not how many entries are held, so that positions stay true."""
        return self.seen

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Replace the entries with these, (B, H', C, K) each."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    @abstractmethod
    def absorb(self, kept: Any) -> None:
        """Absorb the pending entries as ``CountedCache.kept`` says."""

    def reset(self) -> None:
        super().reset()
        self.turn, self.seen, self.pending = None, 0, 0


class CountedCache(PositionedCache, ABC):
    """Abstract: a cache with ``layers`` of one kind, one for each layer of the model.

    Assisted decoding takes tokens back. That works when ``generate`` receives the cache empty, because it then turns
    recording on. Otherwise it works only until an entry was dropped, and raises TautError after that.
    """

    def __init__(self, layers: list[CountedLayer]) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = layers, None
        self.width = 0

    @abstractmethod
    def kept(self, absorbed: int, fresh: int, device: torch.device) -> Any:
        """What layers do to absorb ``fresh`` tokens, appended to what they hold of ``absorbed`` earlier ones."""

    @property
    @abstractmethod
    def dropped(self) -> bool:
        """Whether some token that was seen is no longer held unchanged."""

    def finish(self) -> None:
        self.key_positions = self.marks = None
        for layer in self.layers:
            layer.turn = None

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """The number of keys in this forward pass, and an offset of 0."""
        return self.width, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens and absorb the other pending ones. Raises TautError when the
        cache has dropped entries that this needs."""
        first, count = self.layers[0], abs(tokens_to_remove)
        fresh = first.pending - count
        if fresh < 0 and (self.starts is not None or self.dropped):
            raise TautError(
                f"crop({tokens_to_remove}): the cache has dropped entries needed to take {count} tokens back. For "
                "assisted decoding, pass an empty cache of this recipe as past_key_values"
            )
        kept = self.kept(first.seen - first.pending, fresh, first.device) if fresh > 0 else None
        for layer in self.layers:
            layer.seen -= count
            if count:
                layer.keys, layer.values = layer.keys[:, :, :-count], layer.values[:, :, :-count]
            layer.absorb(kept)

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.layers[0].seen)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.recount(int(state["seen"]))

    def detach(self) -> None:
        """Detach all keys and values, so that no gradient of a later pass reaches them."""
        for layer in self.layers:
            layer.keys, layer.values = layer.keys.detach(), layer.values.detach()

    def recount(self, seen: int) -> None:
        """Set the number of tokens seen, as if each row's first token had moved with it. A row that restarts then has
        padding up to here, and its old entries are ignored."""
        for layer in self.layers:
            layer.seen = seen

    def counts(self, seen: int, device: torch.device) -> Tensor:
        """How many real tokens each row has among the first ``seen``: (B or 1,)."""
        return self.since(seen, device).clamp(min=0)

    def since(self, seen: int, device: torch.device) -> Tensor:
        """The position of token number ``seen`` in each row, (B or 1,): below 0 if the row has not begun."""
        return torch.tensor([seen], device=device) - (0 if self.starts is None else self.starts.to(device))

    @property
    def columns(self) -> int:
        """How many entries each layer holds, without the pending ones."""
        first = self.layers[0]
        return first.keys.shape[2] - first.pending if first.is_initialized else 0
