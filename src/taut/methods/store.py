"""``store:`` in a recipe: the factors, cores or codebooks of a part, themselves in few bits."""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor

from taut.ops.quantization.rowwise import RowFormat, lookup, pack, unpack


class Knobs(BaseModel):
    """The choices of a method. Every field has a description, a default where one makes sense, and a range."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Store(Knobs):
    """How a float tensor is kept: packed rows, each group of numbers with a scale and a bias of its own."""

    method: Literal["low_bit"] = Field("low_bit", description="the one method that nests")
    bits: Literal[8, 6, 4, 3, 2] = Field(8, description="bits of a number")
    group: int | None = Field(None, ge=2, description="how many numbers of a row share a scale; none: all")
    clip: bool = Field(True, description="give up a group's largest numbers where that lowers its squared error")

    def __str__(self) -> str:
        return f"{self.bits} bits" + (f", groups of {self.group}" if self.group else "")

    def layout(self, width: int) -> RowFormat:
        """The format of rows of ``width`` numbers."""
        return RowFormat(self.bits, width, min(self.group or width, width))

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(rows, groups, bytes of a group) of a tensor of ``shape``, whose last axis is a row."""
        layout = self.layout(shape[-1])
        return math.prod(shape[:-1]), layout.groups, layout.group_bytes

    def bytes(self, shape: tuple[int, ...]) -> int:
        """Stored bytes of a tensor of ``shape``, scales included; exact."""
        return math.prod(self.packed_shape(shape))

    def pack(self, value: Tensor) -> Tensor:
        """(..., N) float -> packed uint8. Raises TautError for numbers that are not finite."""
        return pack(value.reshape(-1, value.shape[-1]), self.layout(value.shape[-1]), clip=self.clip)

    def unpack(self, packed: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Packed uint8 -> the tensor, of ``shape``."""
        return unpack(packed, self.layout(shape[-1])).to(dtype).reshape(shape)

    def lookup(self, packed: Tensor, ids: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Rows of the packed tensor: (...) ids -> (..., ``width``), nothing else expanded."""
        return lookup(packed, ids, self.layout(width), dtype)

    def straight_through(self, value: Tensor) -> Tensor:
        """``value`` as it will be once stored; the gradient passes as if nothing had been rounded."""
        with torch.no_grad():
            rounding = self.unpack(self.pack(value), tuple(value.shape), value.dtype) - value
        return value + rounding


def stored_bytes(shape: tuple[int, ...], store: Store | None, width_in_bytes: int) -> int:
    """Bytes of a tensor that a part holds: dense at ``width_in_bytes`` a number, or packed."""
    return math.prod(shape) * width_in_bytes if store is None else store.bytes(shape)


def _unsearched(given: Any) -> Any:
    return {"clip": False, **given} if isinstance(given, dict) else given


CacheStore = Annotated[Store | None, BeforeValidator(_unsearched)]
"""The ``store`` of a memory. A cache packs at every step, so no range is searched for unless ``clip`` is asked for."""
