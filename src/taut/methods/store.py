"""``store:`` in a recipe: how the factors, cores or codebooks of a part are themselves stored in few bits."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from taut.ops.quantization.rowwise import RowFormat, lookup, pack, unpack


class Knobs(BaseModel):
    """The knobs of a method. Every field has a description, a range and, where one makes sense, a default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Store(Knobs):
    """How a float tensor is stored: in packed rows, where each group of numbers has its own scale and bias."""

    method: Literal["low_bit"] = Field("low_bit", description="the only method that can store the tensors of another")
    bits: Literal[8, 6, 4, 3, 2] = Field(8, description="bits of each number")
    group: int | None = Field(None, ge=2, description="how many numbers of a row share a scale; default: all")
    clip: bool = Field(True, description="clip a group's largest numbers where that lowers its squared error")

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f", groups of {self.group}" if self.group else "")

    def layout(self, width: int) -> RowFormat:
        """Return the format of rows of ``width`` numbers."""
        return RowFormat(self.bits, width, min(self.group or width, width))

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return (rows, groups, bytes of a group) for a tensor of ``shape``, whose last axis is a row."""
        layout = self.layout(shape[-1])
        return math.prod(shape[:-1]), layout.groups, layout.group_bytes

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Count the stored bytes of a tensor of ``shape``, scales included; exact."""
        return math.prod(self.packed_shape(shape))

    def pack(self, value: Tensor) -> Tensor:
        """Pack (..., N) float -> uint8. Raises TautError for numbers that are not finite."""
        return pack(value.reshape(-1, value.shape[-1]), self.layout(value.shape[-1]), clip=self.clip)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Expand packed uint8 -> the tensor, of ``shape``."""
        return unpack(packed, self.layout(shape[-1])).to(dtype).reshape(shape)

    def lookup(self, packed: Tensor, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Look up rows of the packed tensor: (...) ids -> (..., ``width``). Expands no other row."""
        return lookup(packed, ids, self.layout(width), dtype)

    def straight_through(self, value: Tensor) -> Tensor:
        """Return ``value`` as it will be once stored. For the gradient the rounding is the identity."""
        with torch.no_grad():
            rounding = self.unpack(self.pack(value), tuple(value.shape), value.dtype) - value
        return value + rounding


def stored_bytes(shape: tuple[int, ...], store: Store | None, width_in_bytes: int) -> int:
    """Count the bytes of a tensor that a part holds: packed, or dense with ``width_in_bytes`` per number."""
    return math.prod(shape) * width_in_bytes if store is None else store.bytes(shape)


def _unsearched(given: Any) -> Any:
    return {"clip": False, **given} if isinstance(given, dict) else given


CacheStore = Annotated[Store | None, BeforeValidator(_unsearched)]
"""The ``store`` of a memory method. A cache packs at every step, so ``clip`` and its search are off by default."""
