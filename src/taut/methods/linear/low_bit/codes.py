"""Two ways to store a linear map in few bits, behind one interface.

``OutputScales`` has a scale for each output and rounded inputs, for an integer product. ``GroupScales`` has scales for
groups of outputs at each input, for a product with floats.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.methods.linear.low_bit.float_activations import FloatGrid
from taut.ops.quantization import grouped_linear, int8_linear
from taut.ops.quantization.grouped_linear import GroupFormat


class MapCodes(ABC):
    """Abstract: a map (M, N) as one int8 tensor of ``shape``.

    What the product needs to know about the inputs in advance is a uint8 tensor of ``input_bytes`` bytes, called
    ``known`` below; it is None when nothing is needed.
    """

    shape: tuple[int, ...]
    input_bytes: int

    @abstractmethod
    def pack(self, weight: Tensor) -> Tensor:
        """Choose scales and codes: (M, N) float -> int8 of ``shape``. Deterministic.

        Raises TautError for numbers that are not finite or too large for a scale.
        """

    @abstractmethod
    def repack(self, weight: Tensor, packed: Tensor) -> Tensor:
        """Pack (M, N) float with the scales of ``packed``. The numbers must be near those ``packed`` was made from."""

    @abstractmethod
    def rounder(self, packed: Tensor) -> Callable[[Tensor, int], Tensor]:
        """Return a function that rounds the column of one input as ``repack`` does: (M,) and its index -> (M,)."""

    @abstractmethod
    def expand(self, packed: Tensor) -> Tensor:
        """Return the dense equivalent, (M, N) float32."""

    @abstractmethod
    def learn_inputs(self, least: Tensor, greatest: Tensor) -> Tensor:
        """Store each input's least and greatest number, (N,) float -> (``input_bytes``,) uint8."""

    @abstractmethod
    def rounded(self, x: Tensor, known: Tensor | None) -> Tensor:
        """Round inputs (..., N) as the product does. ``known`` is the result of ``learn_inputs``, or None."""

    @abstractmethod
    def linear(self, x: Tensor, packed: Tensor, known: Tensor | None, bias: Tensor | None) -> Tensor:
        """Multiply: (..., N) -> (..., M) in the dtype of ``x``. For the gradient the rounding is the identity."""


@dataclass(frozen=True)
class OutputScales(MapCodes):
    """8-bit weights (ops.quantization.int8_linear) and inputs rounded to 8 bits.

    Each token is rounded with its own range; with ``fixed``, all tokens with the one range found in calibration.
    """

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
    """2 to 8 bits a weight (ops.quantization.grouped_linear). Inputs stay exact, unless ``grid`` rounds them to short
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
    """Return ``rounded`` with the gradient of ``x``."""
    # The difference is zero, so every bit of ``rounded`` stays.
    return rounded.detach() + (x - x.detach()) if rounded is not x and x.requires_grad else rounded
