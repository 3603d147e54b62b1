"""Contiguous lanes: row b of a batch goes on where row b of the batch before ended, and takes its memory along."""

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
    "carry_memory = true: nothing would be carried from one batch to the next; give the recipe a bounded memory, "
    "such as memory: {method: segment_recurrence}"
)


LONG = 1 << 40
"""Tokens of a text that fills any memory."""
STATE = "state."
"""Before the names of what a cache keeps besides keys and values."""


class Bounded(Protocol):
    """What a lane needs of a cache; ``taut.ops.caches.counted`` says what it means."""

    layers: Sequence[Any]

    def state(self) -> dict[str, Tensor]: ...

    def restore(self, state: dict[str, Tensor]) -> None: ...

    def detach(self) -> None: ...

    def recount(self, seen: int) -> None: ...


@dataclass(frozen=True)
class MemoryState:
    """The memory of some lanes after a batch. ``ages`` (B,) int64: how many tokens each has read since it began."""

    cache: Bounded
    ages: Tensor


class CarriedMemory:
    """The memories that the pieces of a step carry to the same pieces of the next one, detached.

    A lane begins anew where its row says so, and before it would outgrow the model's ``positions`` (None: endless). It
    remembers at most ``entries`` tokens.
    """

    def __init__(self, empty: Callable[[], Bounded], entries: int, positions: int | None) -> None:
        self.empty, self.entries, self.positions = empty, entries, positions
        self.pieces: list[MemoryState] = []
        self.piece = 0

    @classmethod
    def of(cls, model: PreTrainedModel) -> "CarriedMemory":
        """Those of a model. Raises TautError when its recipe has no memory that can be carried."""
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
        """How many keys a row of ``length`` tokens looks at, at most: its own and what its lane remembers."""
        return min(length + self.entries, self.positions or LONG)

    def emptied(self) -> "CarriedMemory":
        """Others of the same model."""
        return CarriedMemory(self.empty, self.entries, self.positions)

    def begin(self) -> None:
        """The first piece of a step comes next."""
        self.piece = 0

    def read(self, model: PreTrainedModel, ids: Tensor, mask: Tensor | None, restart: Tensor) -> Tensor:
        """Logits (B, T, V) of the next piece: ids (B, T), a mask (B, T) where rows end in padding, and ``fresh`` (B,)
        bool where a lane begins anew."""
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
        given = {} if mask is None else {"attention_mask": mask}
        if bool((ages < seen).any()):
            # To the cache a younger lane is a row with padding where its past would be.
            known = torch.arange(seen, device=ids.device) >= seen - ages[:, None]
            given["attention_mask"] = torch.cat([known.long(), torch.ones_like(ids) if mask is None else mask], 1)
            given["position_ids"] = ages[:, None] + torch.arange(length, device=ids.device)
        elif mask is not None:
            given["attention_mask"] = torch.cat([mask.new_ones(len(ids), seen), mask], 1)
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, **given)
        cache.detach()
        self.pieces[self.piece : self.piece + 1] = [MemoryState(cache, ages + length)]
        self.piece += 1
        return output.logits

    def state_dict(self) -> dict[str, Tensor]:
        """All that is carried, by names."""
        state = {}
        for index, carried in enumerate(self.pieces):
            state[f"{index}.ages"] = carried.ages
            state |= {f"{index}.{STATE}{name}": tensor for name, tensor in carried.cache.state().items()}
            for layer, held in enumerate(carried.cache.layers):
                state[f"{index}.{layer}.keys"] = held.keys.contiguous()
                state[f"{index}.{layer}.values"] = held.values.contiguous()
        return state

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        state = {name: tensor.to(device) for name, tensor in state.items()}
        self.pieces = []
        while f"{len(self.pieces)}.ages" in state:
            index, cache = len(self.pieces), self.empty()
            for number, layer in enumerate(cache.layers):
                layer.hold(state[f"{index}.{number}.keys"], state[f"{index}.{number}.values"])
            own = f"{index}.{STATE}"
            cache.restore({name.removeprefix(own): each for name, each in state.items() if name.startswith(own)})
            self.pieces.append(MemoryState(cache, state[f"{index}.ages"]))
