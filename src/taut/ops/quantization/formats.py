"""Number formats for a block of numbers that share a scale: integers, NF4, and the 4-bit floats FP4, MXFP4 and NVFP4.

A number format turns a block into codes, one byte each and not packed yet, and a tail: the bytes of the block's scale.
The scale is rounded to its stored type before the codes are chosen. A number comes back as level[code] * scale + bias.
For integers the level is the code itself. Only integers have a bias.
"""

import math
from abc import ABC, abstractmethod
from functools import cache

import torch
from torch import Tensor

from taut.core.errors import TautError, nearest

SHRINKS = tuple(1 - step / 20 for step in range(1, 11))
"""The factors that the scale search tries on a range: .95, .90, ... .50."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E2M1 = (*(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0))
"""One sign bit, two exponent bits with bias 1, one mantissa bit. No infinity and no NaN."""
E4M3_TOP, E4M3_LEAST = 448.0, 2.0**-9
NVFP4_TOP = E4M3_TOP * E2M1[7]
"""The largest number that NVFP4 blocks can hold. A table is first divided by (its own largest number / this)."""
CELLS = 1 << 10


class NumberFormat(ABC):
    """Abstract. ``bits`` of a code, ``tail_bytes`` of a block's scale. ``factors``: the scale search multiplies the
    range by these, besides 1. ``usual_group``: the default block size (None: a whole row). ``fixed_group``: whether the
    format's definition allows no other size."""

    bits: int
    tail_bytes: int
    factors: tuple[float, ...]
    usual_group: int | None = None
    fixed_group = False

    @abstractmethod
    def quantise(self, numbers: Tensor, factor: float, symmetric: bool) -> tuple[Tensor, Tensor]:
        """Blocks (n, G) float32 -> codes (n, G) uint8 and tails (n, ``tail_bytes``) uint8. Raises TautError for
        numbers beyond what the scale's type can hold."""

    @abstractmethod
    def scales(self, tail: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tails -> scales and biases, (n, 1) float32. The bias is None for formats without one."""

    @abstractmethod
    def nearest(self, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Blocks (n, G) float32 -> the nearest codes (n, G) uint8 under the given scales and biases (n, 1)."""

    @abstractmethod
    def levels(self, device: torch.device) -> Tensor:
        """(2 ** ``bits``,) float32: the number that each code stands for at scale 1."""

    def dequantise(self, codes: Tensor, tail: Tensor) -> Tensor:
        """(n, G) codes and their tails -> (n, G) float32: the plain formula."""
        return self.decode(codes, *self.scales(tail))

    def decode(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """``dequantise`` with scales (n, 1) instead of tails."""
        levels = self.levels(codes.device).index_select(0, codes.int().reshape(-1)).view(codes.shape)
        return levels.mul_(scale) if bias is None else levels.mul_(scale).add_(bias)


class Integer(NumberFormat):
    """Evenly spaced levels from a group's least to its largest number. The scale and bias are float32 for 8 bits and
    float16 for fewer."""

    factors = SHRINKS

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.scale_dtype = torch.float32 if bits == 8 else torch.float16
        self.tail_bytes = 2 * self.scale_dtype.itemsize

    def quantise(self, numbers: Tensor, factor: float, symmetric: bool) -> tuple[Tensor, Tensor]:
        low, high = numbers.aminmax(dim=1, keepdim=True)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        if factor != 1:
            cut = (high - low) * (1 - factor) / 2
            low, high = low + cut, high - cut
        top, middle = 2**self.bits - 1, 2 ** (self.bits - 1)
        if symmetric:
            scale = _nonzero((high / (middle - 1)).to(self.scale_dtype))
            bias = scale * -middle
            codes = (numbers / scale.float()).round_().add_(middle).clamp_(1, top)
        else:
            bias = _not_above(low, self.scale_dtype)
            scale = _nonzero(((high - bias.float()) / top).to(self.scale_dtype))
            codes = self.nearest(numbers, scale.float(), bias.float())
        _check((scale, bias), numbers, self.bits)
        return codes.to(torch.uint8), torch.cat((scale, bias), dim=1).view(torch.uint8)

    def scales(self, tail: Tensor) -> tuple[Tensor, Tensor | None]:
        # A copy, because a view as floats needs an aligned start.
        scale, bias = tail.clone(memory_format=torch.contiguous_format).view(self.scale_dtype).float().split(1, dim=1)
        return scale, bias

    def nearest(self, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return ((numbers - bias) / scale).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def levels(self, device: torch.device) -> Tensor:
        return torch.arange(2**self.bits, device=device, dtype=torch.float32)


class Levels(NumberFormat):
    """Abstract: sixteen fixed levels about zero. Each number takes the nearest; a tie takes the even code."""

    bits = 4
    values: tuple[float, ...]

    @abstractmethod
    def store(self, largest: Tensor) -> Tensor:
        """The largest magnitude of each block (n, 1) float32 -> tails (n, ``tail_bytes``) uint8 that map it to the
        largest level, or near it if the format allows no better."""

    def quantise(self, numbers: Tensor, factor: float, symmetric: bool) -> tuple[Tensor, Tensor]:
        tail = self.store(numbers.abs().amax(dim=1, keepdim=True) * factor)
        return self.nearest(numbers, *self.scales(tail)), tail

    def nearest(self, numbers: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        return nearest_codes(numbers / scale, self.values)

    def levels(self, device: torch.device) -> Tensor:
        return torch.tensor(self.values, device=device)


class HalfScale(Levels):
    """Abstract: one float16 scale per group."""

    tail_bytes, usual_group = 2, 64

    def store(self, largest: Tensor) -> Tensor:
        stored = (largest / max(self.values)).half().clamp_(min=2.0**-24)
        _check((stored,), largest, self.bits)
        return stored.view(torch.uint8)

    def scales(self, tail: Tensor) -> tuple[Tensor, None]:
        return tail.clone(memory_format=torch.contiguous_format).view(torch.float16).float(), None


class NormalFloat(HalfScale):
    """NF4: the levels are quantiles of a normal distribution (Dettmers et al. 2023, arXiv 2305.14314)."""

    values, factors = NF4, SHRINKS


class Float4(HalfScale):
    """E2M1 with a real exponent bias b for each group (Liu et al. 2023, LLM-FP4, arXiv 2310.16836).

    With two exponent bits and one mantissa bit this is the scale 2^(1 - b). The search tries the paper's hundred
    factors, but on the scale instead of on b. So it gives the same codes whatever unit the table is in.
    """

    values, factors = E2M1, tuple(0.01 + 1.19 * step / 99 for step in range(100))


class MicroscalingFloat4(Levels):
    """MXFP4: the scale is a power of two, one byte (OCP Microscaling Formats 1.0). By the reference's rule, its
    exponent is that of the largest number minus that of the largest level. So numbers from 6 to 8 times the scale
    saturate. The search tries the next power as well."""

    values, factors, tail_bytes = E2M1, (2.0,), 1
    usual_group, fixed_group = 32, True

    def store(self, largest: Tensor) -> Tensor:
        exponent = torch.frexp(largest).exponent - math.frexp(max(self.values))[1]
        return (exponent.clamp_(-127, 127) + 127).to(torch.uint8)

    def scales(self, tail: Tensor) -> tuple[Tensor, None]:
        return tail.view(torch.float8_e8m0fnu).float(), None


class NvidiaFloat4(Levels):
    """NVFP4 without the scale of the whole tensor: one E4M3 scale per group, for numbers up to ``NVFP4_TOP``."""

    values, tail_bytes = E2M1, 1
    usual_group, fixed_group = 16, True
    factors = (1.5, 1.375, 1.25, 1.125, 0.9375, 0.875, 0.8125, 0.75)

    def store(self, largest: Tensor) -> Tensor:
        scale = (largest / max(self.values)).clamp_(E4M3_LEAST, E4M3_TOP)
        return scale.to(torch.float8_e4m3fn).view(torch.uint8)

    def scales(self, tail: Tensor) -> tuple[Tensor, None]:
        return tail.view(torch.float8_e4m3fn).float(), None


FORMATS: dict[str, type[NumberFormat]] = {
    "int": Integer,
    "nf4": NormalFloat,
    "fp4": Float4,
    "mxfp4": MicroscalingFloat4,
    "nvfp4": NvidiaFloat4,
}
BITS = {"int": (8, 6, 4, 3, 2)} | {name: (4,) for name in FORMATS if name != "int"}
"""The widths, in bits, that each format has."""


@cache
def number_format(number: str, bits: int) -> NumberFormat:
    """The format of that name and width. Raises TautError if there is no such name or width."""
    if number not in FORMATS:
        raise TautError(f"unknown number format {number!r}: {nearest(number, FORMATS)}")
    if bits not in BITS[number]:
        raise TautError(f"number: {number} has no {bits} bits: it has {', '.join(map(str, BITS[number]))}")
    return Integer(bits) if number == "int" else FORMATS[number]()


def nearest_codes(numbers: Tensor, values: tuple[float, ...]) -> Tensor:
    """The code of the nearest of ``values``, any shape -> uint8; a tie goes to the even code.

    The range is cut into cells so narrow that none holds two midpoints. So a number's cell and one comparison give its
    code, at a fraction of the cost of a binary search.
    """
    midpoints, below, codes = _cells(values, numbers.device)
    cell = _cell(numbers, values).view(-1)
    place = below.index_select(0, cell) + (numbers.reshape(-1) > midpoints.index_select(0, cell))
    return codes.index_select(0, place).view(numbers.shape)


def _cell(numbers: Tensor, values: tuple[float, ...]) -> Tensor:
    """The cell of each number, out of ``CELLS``. Rounding keeps the order, so both sides of a midpoint stay apart."""
    top = max(values)
    return numbers.clamp(-top, top).add_(top).mul_((CELLS - 1) / (2 * top)).int()


@cache
def _cells(values: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each cell, its midpoint (or infinity) and the number of midpoints in earlier cells; the codes by value."""
    codes = sorted({value: code for code, value in reversed(list(enumerate(values)))}.values(), key=values.__getitem__)
    ordered = torch.tensor([values[code] for code in codes], device=device)
    middles = (ordered[1:] + ordered[:-1]) / 2
    upper_is_even = torch.tensor([code % 2 == 0 for code in codes[1:]], device=device)
    middles = torch.where(upper_is_even, middles.nextafter(ordered[:-1]), middles)
    place = _cell(middles, values)
    midpoints = torch.full((CELLS,), torch.inf, device=device).index_copy_(0, place.long(), middles)
    count = torch.zeros(CELLS, device=device, dtype=torch.int32).index_fill_(0, place.long(), 1)
    return midpoints, (count.cumsum(0) - count).int(), torch.tensor(codes, device=device, dtype=torch.uint8)


def _nonzero(scale: Tensor) -> Tensor:
    """Replace zeros by 1. A group of equal numbers has no range, so any step works."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _not_above(low: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded down to ``dtype``, so that no number lies below the range. float16 keeps 10 of 23 bits."""
    if dtype == torch.float32:
        return low
    bits = low.contiguous().view(torch.int32)
    kept = bits & ~0x1FFF
    kept += torch.where((low < 0) & (kept != bits), 0x2000, 0)
    return kept.view(torch.float32).to(dtype)


def _check(stored: tuple[Tensor, ...], numbers: Tensor, bits: int) -> None:
    if not all(one.isfinite().all() for one in stored):
        raise TautError(
            f"the weight holds numbers up to {float(numbers.abs().max()):.3g}, beyond the {stored[0].dtype} "
            f"scales of {bits}-bit rows{'; use bits: 8' if bits < 8 else ''}"
        )
