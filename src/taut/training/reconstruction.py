"""The attention-reconstruction loss of Compressive Transformers, which trains a memory to compress its entries.

In every layer, the queries of a forward pass attend to the entries that the pass compresses, before and after they are
compressed. The loss is the mean squared difference, summed over layers. Queries and old entries get no gradient.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from taut.methods.base import LEARNED, MemoryMethod
from taut.surgery.apply import steps_of

NO_COMPRESSOR = (
    "the recipe has no memory that learns to compress; give it one, such as memory: {method: compressive, pool: conv}"
)


class Compressing(Protocol):
    """The interface of what compresses entries; see ``taut.ops.caches.pooling``."""

    def reconstructing(self) -> AbstractContextManager[list[Tensor]]: ...


@dataclass(frozen=True)
class Reconstruction:
    """The loss of a model's memory, and its weight."""

    compressor: Compressing
    weight: float

    @classmethod
    def of(cls, model: PreTrainedModel, weight: float) -> "Reconstruction":
        """The loss of a compressed model whose memory method ``reconstructs``."""
        memory = next(
            step for step in steps_of(model) if isinstance(step.method, MemoryMethod) and step.method.reconstructs
        )
        return cls(model.get_submodule(memory.site.path).get_submodule(LEARNED), weight)

    def beside(self, errors: list[Tensor]) -> Tensor:
        """The loss as a term of value 0: added to another loss, it changes the gradient but not the value."""
        error = sum(errors) * self.weight
        return error - error.detach()
