"""Two ways to keep a linear map in few bits, behind one interface: a scale for each output and rounded inputs, for an
integer product; and scales for groups of outputs at each input, for a product with floats."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.methods.linear.low_bit.float_activations import FloatGrid
from taut.ops.quantization import grouped_linear, int8_linear
from taut.ops.quantization.grouped_linear import GroupFormat


class MapCodes(ABC):
    """Abstract. A map (M, N) is one int8 tensor of ``shape``; what must be known about the inputs beforehand is
    ``input_bytes`` of uint8, None where that is nothing."""

    shape: tuple[int, ...]
    input_bytes: int

    @abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """(M, N) float -> int8 of ``shape``. Deterministic. Raises TautError for numbers that are not finite or beyond
        what a scale can hold."""

    @abstractmethod
    def repack(self, weight: Tensor, packed: Tensor) -> Tensor:
        """``pack`` under the scales that ``packed`` has, for numbers near those it was made of."""

    @abstractmethod
    def rounder(self, packed: Tensor) -> Callable[[Tensor, int], Tensor]:
        """What ``repack`` makes of the column of one input: (M,) and its index -> (M,)."""

    @abstractmethod
    def expand(self, packed: Tensor) -> Tensor:
        """The dense equivalent, (M, N) float32."""

    @abstractmethod
    def learn_inputs(self, least: Tensor, greatest: Tensor) -> Tensor:
        """Each input's least and greatest number, (N,) float -> (``input_bytes``,) uint8."""

    @abstractmethod
    def rounded(self, x: Tensor, known: Tensor | None) -> Tensor:
        """(..., N) inputs as the product sees them. ``known`` is what ``learn_inputs`` gave, or None."""

    @abstractmethod
    def linear(self, x: Tensor, packed: Tensor, known: Tensor | None, bias: Tensor | None) -> Tensor:
        """(..., N) -> (..., M) in the dtype of ``x``; the gradient passes straight through the rounding of inputs."""


@dataclass(frozen=True)
class OutputScales(MapCodes):
    """8-bit weights (ops.quantization.int8_linear), inputs rounded to 8 bits: each token by its own range, or, with
    ``fixed``, all by the one that calibration showed."""

    outputs: int
    inputs: int
    fixed: bool = False

    @property
    def shape(self) -> tuple[int]:
        return (int8_linear.packed_size(self.outputs, self.inputs),)

    @property
    def input_bytes(self) -> int:
        return int8_linear.RANGE_BYTES if self.fixed else 0

    def pack(self, weight: Tensor) -> Tensor:
        return int8_linear.pack(weight)

    def repack(self, weight: Tensor, packed: Tensor) -> Tensor:
        return int8_linear.repack(weight, packed)

    def rounder(self, packed: Tensor) -> Callable[[Tensor, int], Tensor]:
        scales = int8_linear.unpack(packed, self.outputs, self.inputs).scales
        return lambda column, index: int8_linear.nearest(column.float(), scales).mul_(scales).to(column.dtype)

    def expand(self, packed: Tensor) -> Tensor:
        return int8_linear.expand(int8_linear.unpack(packed, self.outputs, self.inputs))

    def learn_inputs(self, least: Tensor, greatest: Tensor) -> Tensor:
        return int8_linear.pack_range(float(least.min()), float(greatest.max()))

    def rounded(self, x: Tensor, known: Tensor | None) -> Tensor:
        tokens = x.reshape(-1, self.inputs).float()
        quantised = (
            int8_linear.quantise_tokens(tokens) if known is None else int8_linear.quantise_in_range(tokens, known)
        )
        q, step, low = quantised
        return torch.addcmul(low, q.float(), step).to(x.dtype).view(x.shape)

    def linear(self, x: Tensor, packed: Tensor, known: Tensor | None, bias: Tensor | None) -> Tensor:
        return int8_linear.linear(x, packed, self.outputs, self.inputs, bias, known)


@dataclass(frozen=True)
class GroupScales(MapCodes):
    """2 to 8 bits a weight (ops.quantization.grouped_linear). Inputs stay exact, or ``grid`` rounds them to short
    floats."""

    form: GroupFormat
    symmetric: bool = False
    clip: bool = False
    grid: FloatGrid | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.form.shape

    @property
    def input_bytes(self) -> int:
        return 0 if self.grid is None else self.grid.stored_bytes(self.form.inputs)

    def pack(self, weight: Tensor) -> Tensor:
        return self.form.pack(weight, self.symmetric, self.clip)

    def repack(self, weight: Tensor, packed: Tensor) -> Tensor:
        return self.form.repack(weight, packed)

    def rounder(self, packed: Tensor) -> Callable[[Tensor, int], Tensor]:
        return self.form.rounder(packed)

    def expand(self, packed: Tensor) -> Tensor:
        return self.form.expand(packed)

    def learn_inputs(self, least: Tensor, greatest: Tensor) -> Tensor:
        largest = torch.maximum(-least, greatest)
        return largest.new_empty(0, dtype=torch.uint8) if self.grid is None else self.grid.learn(largest)

    def rounded(self, x: Tensor, known: Tensor | None) -> Tensor:
        return x if self.grid is None else self.grid.rounded(x, known)

    def linear(self, x: Tensor, packed: Tensor, known: Tensor | None, bias: Tensor | None) -> Tensor:
        return grouped_linear.linear(straight_through(x, self.rounded(x, known)), packed, self.form, bias)


def straight_through(x: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, with the gradient of ``x``."""
    # The difference is zero, so not a bit changes.
    return rounded.detach() + (x - x.detach()) if rounded is not x and x.requires_grad else rounded
