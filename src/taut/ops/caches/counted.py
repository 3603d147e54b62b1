"""Bounded caches in which the place of every entry follows from how many tokens were seen, and from nothing else.

So nothing has to be remembered of where entries stand: rows may be reordered, repeated and selected, a left-padded row
holds exactly what the row alone would hold, and a prompt may be cut anywhere.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.caches.base import PositionedCache
from taut.ops.caches.quantized import RowStore, StoredLayer


class CountedLayer(StoredLayer, ABC):
    """Abstract: one layer's entries. ``seen`` counts all tokens; the last ``pending`` are held as they came, behind the
    others (recorded, because assisted decoding may take them back). ``turn`` says what the pass that is running does
    with its new entries."""

    def __init__(self, store: RowStore | None = None) -> None:
        super().__init__(store)
        self.turn: Any = None
        self.seen = self.pending = 0
        self.record_past = False

    def activate_past_recording(self) -> None:
        self.record_past = True

    def get_seq_length(self) -> int:
        """Tokens seen, not entries held: positions stay the true ones."""
        return self.seen

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Hold these (B, H', C, K) entries instead."""
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    @abstractmethod
    def absorb(self, kept: Any) -> None:
        """Take in what is pending, as ``CountedCache.kept`` says."""

    def reset(self) -> None:
        super().reset()
        self.turn, self.seen, self.pending = None, 0, 0


class CountedCache(PositionedCache, ABC):
    """Abstract: ``layers`` alike, one for each of the model's.

    Assisted decoding takes tokens back. That works when the cache is handed to ``generate`` empty (then it is told to
    record them); otherwise only until something was dropped, and raises TautError after that.
    """

    def __init__(self, layers: list[CountedLayer]) -> None:
        super().__init__()
        self.layers, self.layer_class_to_replicate = layers, None
        self.width = 0

    @abstractmethod
    def kept(self, absorbed: int, fresh: int, device: torch.device) -> Any:
        """What layers do to take ``fresh`` tokens in that stand behind what they hold of ``settled`` ones."""

    @property
    @abstractmethod
    def dropped(self) -> bool:
        """Whether some token that was seen is no longer held as it came."""

    def finish(self) -> None:
        self.key_positions = self.marks = None
        for each in self.layers:
            each.turn = None

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys in this forward pass, and 0."""
        return self.width, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, and let go of what was recorded for that."""
        layer, count = self.layers[0], abs(tokens_to_remove)
        fresh = layer.pending - count
        if fresh < 0 and (self.starts is not None or self.dropped):
            raise TautError(
                f"crop({tokens_to_remove}): the cache has dropped what it would need to take {count} tokens back. For "
                "assisted decoding, pass an empty cache of this recipe as past_key_values"
            )
        kept = self.kept(layer.seen - layer.pending, fresh, layer.device) if fresh > 0 else None
        for each in self.layers:
            each.seen -= count
            if count:
                each.keys, each.values = each.keys[:, :, :-count], each.values[:, :, :-count]
            each.absorb(kept)

    def state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.layers[0].seen)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.recount(int(state["seen"]))

    def detach(self) -> None:
        """Let no gradient reach what is held: what comes next takes it as given."""
        for each in self.layers:
            each.keys, each.values = each.keys.detach(), each.values.detach()

    def recount(self, seen: int) -> None:
        """Go on as if the rows had begun so much later that ``seen`` tokens have come. A row that begins anew then has
        padding until here, and what it held counts for nothing."""
        for each in self.layers:
            each.seen = seen

    def counts(self, seen: int, device: torch.device) -> Tensor:
        """How many real tokens each row has among the first ``seen``: (B or 1,)."""
        return self.since(seen, device).clamp(min=0)

    def since(self, seen: int, device: torch.device) -> Tensor:
        """The position of token number ``seen`` in each row, (B or 1,): below 0 where the row has not begun."""
        return torch.tensor([seen], device=device) - (0 if self.starts is None else self.starts.to(device))

    @property
    def columns(self) -> int:
        """How many entries the layers hold, the pending ones apart."""
        layer = self.layers[0]
        return layer.keys.shape[2] - layer.pending if layer.is_initialized else 0
