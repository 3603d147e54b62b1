"""The attention-reconstruction loss of Compressive Transformers: what learns to compress learns what queries look for.

Of every layer, attention of the queries of a pass to the entries that the pass compresses, before and after: the mean
square of the difference, added over layers. Queries and old entries are taken as given.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from taut.methods.base import LEARNED, MemoryMethod
from taut.surgery.apply import steps_of

NO_COMPRESSOR = (
    "nothing here learns to compress; give the recipe a memory that does, such as "
    "memory: {method: compressive, pool: conv}"
)


class Compressing(Protocol):
    """What a model compresses with; ``taut.ops.caches.pooling`` says what it means."""

    def reconstructing(self) -> AbstractContextManager[list[Tensor]]: ...


@dataclass(frozen=True)
class Reconstruction:
    """The loss of a model's memory, by this weight."""

    compressor: Compressing
    weight: float

    @classmethod
    def of(cls, model: PreTrainedModel, weight: float) -> "Reconstruction":
        """That of a compressed model whose memory ``reconstructs``."""
        memory = next(
            step for step in steps_of(model) if isinstance(step.method, MemoryMethod) and step.method.reconstructs
        )
        return cls(model.get_submodule(memory.site.path).get_submodule(LEARNED), weight)

    def beside(self, errors: list[Tensor]) -> Tensor:
        """For the gradient alone: its value is 0, so that a loss it is added to stays what it was."""
        error = sum(errors) * self.weight
        return error - error.detach()
