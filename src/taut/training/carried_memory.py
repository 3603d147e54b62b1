"""Carried memory: row b of each batch continues row b of the previous batch and keeps its memory.

The rows b of all batches form one stream.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from taut.architectures.positions import position_limit
from taut.core.errors import TautError
from taut.methods.base import AttentionMethod, MemoryMethod
from taut.surgery.apply import is_compressed, steps_of

NO_MEMORY = (
    "carry_memory = true: there is no memory to carry from one batch to the next; give the recipe a bounded memory, "
    "such as memory: {method: segment_recurrence}"
)


LONG = 1 << 40
"""The length of a text that fills any memory."""
STATE = "state."
"""The prefix of the names of what a cache keeps besides keys and values."""


class Bounded(Protocol):
    """The interface of a cache that can be carried; see ``taut.ops.caches.counted``."""

    layers: Sequence[Any]

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def detach(self) -> None: ...

    def recount(self, seen: int) -> None: ...


@dataclass(frozen=True)
class MemoryState:
    """The memory of some streams after a batch. ``ages`` (B,) int64: the tokens each has read since its restart."""

    cache: Bounded
    ages: Tensor


class CarriedMemory:
    """The memory that each piece of a step carries to the same piece of the next step, detached.

    A stream restarts where its row says so, and before it would exceed the model's ``positions`` (None: no limit). It
    remembers at most ``entries`` tokens.
    """

    def __init__(self, empty: Callable[[], Bounded], entries: int, positions: int | None) -> None:
        self.empty, self.entries, self.positions = empty, entries, positions
        self.pieces: list[MemoryState] = []
        self.piece = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CarriedMemory":
        """The carried memory of a model. Raises TautError if its recipe has no memory that can be carried."""
        steps = steps_of(model) if is_compressed(model) else ()
        memories = [step for step in steps if isinstance(step.method, MemoryMethod) and step.method.carried]
        if not memories:
            raise TautError(NO_MEMORY)
        method, site = memories[0].method, memories[0].site
        positions = position_limit(model.config)
        if any(isinstance(step.method, AttentionMethod) and step.method.own_positions for step in steps):
            positions = None
        return cls(lambda: method.cache(site.layers), method.entries(replace(site, length=LONG)), positions)

    def keys(self, length: int) -> int:
        """The most keys that a row of ``length`` tokens can see: its own and those its stream remembers."""
        return min(length + self.entries, self.positions or LONG)

    def emptied(self) -> "CarriedMemory":
        """An empty carried memory of the same model."""
        return CarriedMemory(self.empty, self.entries, self.positions)

    def begin(self) -> None:
        """Start a step: its first piece comes next."""
        self.piece = 0

    def read(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None, restart: Tensor) -> Tensor:
        """Compute the logits (B, T, V) of the next piece.

        ids (B, T), a mask (B, T) if rows end in padding, and ``restart`` (B,) bool for the streams that restart.
        """
        length = ids.shape[1]
        if bool(restart.all()) or self.piece == len(self.pieces):
            ages = torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        else:
            ages = self.pieces[self.piece].ages.masked_fill(restart, 0)
        if self.positions is not None:
            ages = ages.masked_fill(ages + length > self.positions, 0)
        seen = int(ages.max())
        cache = self.pieces[self.piece].cache if seen else self.empty()
        cache.recount(seen)
        inputs = {} if mask is None else {"attention_mask": mask}
        if bool((ages < seen).any()):
            # For the cache, a stream with a shorter past is a row with padding before that past.
            remembered = torch.arange(seen, device=ids.device) >= seen - ages[:, None]
            inputs["attention_mask"] = torch.cat([remembered.long(), torch.ones_like(ids) if mask is None else mask], 1)
            inputs["position_ids"] = ages[:, None] + torch.arange(length, device=ids.device)
        elif mask is not None:
            inputs["attention_mask"] = torch.cat([mask.new_ones(len(ids), seen), mask], 1)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, **inputs)
        cache.detach()
        self.pieces[self.piece : self.piece + 1] = [MemoryState(cache, ages + length)]
        self.piece += 1
        return output.logits

    def state_dict(self) -> dict[str, Tensor]:
        """All carried tensors by name."""
        state = {}
        for index, carried in enumerate(self.pieces):
            state[f"{index}.ages"] = carried.ages
            state |= {f"{index}.{STATE}{name}": tensor for name, tensor in carried.cache.state().items()}
            for number, layer in enumerate(carried.cache.layers):
                state[f"{index}.{number}.keys"] = layer.keys.contiguous()
                state[f"{index}.{number}.values"] = layer.values.contiguous()
        return state

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        state = {name: tensor.to(device) for name, tensor in state.items()}
        self.pieces = []
        while f"{len(self.pieces)}.ages" in state:
            index, cache = len(self.pieces), self.empty()
            for number, layer in enumerate(cache.layers):
                layer.hold(state[f"{index}.{number}.keys"], state[f"{index}.{number}.values"])
            prefix = f"{index}.{STATE}"
            cache.restore(
                {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            )
            self.pieces.append(MemoryState(cache, state[f"{index}.ages"]))
