"""Linear maps with 8-bit weights and inputs quantised to 8 bits on the fly: an exact integer product, then scaled back.

A weight (M, N) is one int8 tensor of one dimension: the codes row after row, padded to a multiple of 4, then M float32
scales, then the M sums of each row's codes, also float32. Each row is quantised symmetrically: W ~ scale * code.

Inputs are quantised to x ~ step * q + low with q in 0..255. The range of a token is either that of its own least and
greatest number, or one range for all tokens that was determined before. So a token's result does not depend on the
other tokens in the call. Then W x + b = scale * (step * (codes . q) + low * sum(codes)) + b.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError
from taut.ops.quantization.packed_gradients import register_gradients

RANGE_BYTES = 16
EXACT = 512
"""Columns whose products of 8-bit codes add up to less than 2**24: 255 * 128 * 512."""


class Int8Weight(NamedTuple):
    """Views of a packed weight: ``codes`` (M, N) int8, ``scales`` (M,) and ``sums`` (M,) float32."""

    codes: Tensor
    scales: Tensor
    sums: Tensor


def packed_size(outputs: int, inputs: int) -> int:
    """Bytes of a packed weight."""
    return -(-outputs * inputs // 4) * 4 + 8 * outputs


def pack(weight: Tensor) -> Tensor:
    """(M, N) float -> (``packed_size``,) int8: the nearest codes in -127..127, one scale per row. Deterministic.

    Raises TautError for numbers that are not finite.
    """
    if not weight.isfinite().all():
        raise TautError("the weight holds numbers that are not finite; repair it before packing")
    weight = weight.detach().float()
    scales = weight.abs().amax(dim=1) / 127
    return _packed(weight, torch.where(scales == 0, 1.0, scales))


def repack(weight: Tensor, packed: Tensor) -> Tensor:
    """(M, N) float -> packed, like ``pack``, but with the scales of ``packed``: the nearest codes under these."""
    scales = unpack(packed, *weight.shape).scales
    return _packed(weight.detach().float(), scales)


def _packed(weight: Tensor, scales: Tensor) -> Tensor:
    codes = nearest(weight, scales[:, None]).to(torch.int8)
    sums = codes.sum(dim=1, dtype=torch.int32).float()
    padding = codes.new_zeros(-codes.numel() % 4)
    return torch.cat((codes.flatten(), padding, torch.cat((scales, sums)).view(torch.int8)))


def nearest(numbers: Tensor, scales: Tensor) -> Tensor:
    """The codes of ``numbers``, as floats."""
    return (numbers / scales).round_().clamp_(-127, 127)


def unpack(packed: Tensor, outputs: int, inputs: int) -> Int8Weight:
    """Views into ``packed``; nothing is copied."""
    # Few operations: with one token, each costs as much as the arithmetic of a small map.
    floats = packed.view(torch.float32)
    return Int8Weight(
        packed.as_strided((outputs, inputs), (inputs, 1)), floats[-2 * outputs : -outputs], floats[-outputs:]
    )


def expand(weight: Int8Weight, dtype: torch.dtype = torch.float32) -> Tensor:
    """The dense equivalent (M, N) of ``dtype``."""
    return (weight.codes * weight.scales[:, None]).to(dtype)


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N) float32 -> q (T, N) uint8, ``step`` (T, 1) and ``low`` (T, 1) float32, so that x ~ step * q + low.

    One fused FBGEMM pass on a CPU, the same formula in plain torch elsewhere. A row of NaN gives NaN. Single NaNs among
    finite numbers are lost.
    """
    fused = getattr(torch.ops.quantized, "embedding_bag_byte_prepack", None) if x.device.type == "cpu" else None
    if fused is None:
        return quantise_tokens_plainly(x)
    rows, width = fused(x), x.shape[1]
    # The last eight bytes of a row are step and low; a view as floats needs them aligned.
    floats = (rows if width % 4 == 0 else rows[:, width:].clone(memory_format=torch.contiguous_format)).view(
        torch.float32
    )
    return rows[:, :width], floats[:, -2:-1], floats[:, -1:]


def quantise_tokens_plainly(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The formula of ``quantise_tokens``: 255 equal steps between a token's least and greatest number."""
    low, high = x.aminmax(dim=1, keepdim=True)
    # The constant is FBGEMM's. It prevents a division by zero when all numbers of a token are equal.
    q = ((x - low) * (255 / (high - low + 1e-8))).round().to(torch.uint8)
    return q, (high - low) / 255, low


def pack_range(least: float, greatest: float) -> Tensor:
    """The range of all inputs -> (``RANGE_BYTES``,) uint8: four float32 numbers, ``step``, ``low``, and the factor and
    offset that turn a number into its code. The range is widened to include zero, which has an exact code."""
    low, high = min(least, 0.0), max(greatest, 0.0)
    step = (high - low) / 255 or 1.0
    zero = round(-low / step)
    # Adds 0.5, because truncating is faster than rounding.
    return torch.tensor((step, -step * zero, 1 / step, zero + 0.5)).view(torch.uint8)


def quantise_in_range(x: Tensor, packed_range: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T, N) float32 and ``pack_range`` -> q (T, N) uint8, ``step`` and ``low``, both without dimensions. Numbers
    outside the range are clamped to its ends; a NaN is lost."""
    step, low, rate, move = packed_range.view(torch.float32).unbind()
    return x.mul(rate).add_(move).clamp_(0, 255).to(torch.uint8), step, low


def linear(
    x: Tensor,
    packed: Tensor,
    outputs: int,
    inputs: int,
    bias: Tensor | None = None,
    packed_range: Tensor | None = None,
) -> Tensor:
    """(..., N) x packed (M, N) + bias (M,) -> (..., M), in the dtype of ``x``; computed in float32.

    ``packed_range`` is the range of all inputs (``pack_range``); without it every token has its own range. A device
    other than the CPU multiplies the rounded inputs by the expanded weight. The
    gradient is that of the expanded weight. It treats the rounding of the inputs as the identity (straight through).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _linear(x, bias, packed, packed_range, outputs, inputs)
    # A custom operator costs about 20 microseconds, a third of a small map with one token.
    return _forward(x, bias, packed, packed_range, outputs, inputs)


@torch.library.custom_op("taut::int8_linear", mutates_args=())
def _linear(
    x: Tensor, bias: Tensor | None, packed: Tensor, packed_range: Tensor | None, outputs: int, inputs: int
) -> Tensor:
    """Opaque to compilers."""
    return _forward(x, bias, packed, packed_range, outputs, inputs)


@_linear.register_fake
def _linear_shape(
    x: Tensor, bias: Tensor | None, packed: Tensor, packed_range: Tensor | None, outputs: int, inputs: int
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _input_gradient(gradient: Tensor, packed: Tensor, outputs: int, inputs: int) -> Tensor:
    return gradient @ expand(unpack(packed, outputs, inputs), gradient.dtype)


register_gradients(_linear, _input_gradient, bias=True)


def _forward(
    x: Tensor, bias: Tensor | None, packed: Tensor, packed_range: Tensor | None, outputs: int, inputs: int
) -> Tensor:
    weight, tokens = unpack(packed, outputs, inputs), x.reshape(-1, inputs).float()
    q, step, low = quantise_tokens(tokens) if packed_range is None else quantise_in_range(tokens, packed_range)
    bias = None if bias is None else bias.float()
    if x.device.type == "cpu":
        answer = _scaled_product(q, step, low, weight, bias)
    else:
        answer = F.linear(torch.addcmul(low, q.float(), step), expand(weight), bias)
    return answer.to(x.dtype).view(*x.shape[:-1], outputs)


def _scaled_product(q: Tensor, step: Tensor, low: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    answer = integer_product(q, weight.codes)
    if step.dim() == 0:
        # With one range for all tokens, its factors are applied per output, so one pass over the answer is enough.
        offset = low * weight.scales * weight.sums
        offset = offset if bias is None else offset.add_(bias)
        return torch.addcmul(offset, answer, weight.scales * step, out=answer)
    answer = answer.mul_(step).addcmul_(low, weight.sums)
    return answer.mul_(weight.scales) if bias is None else torch.addcmul(bias, answer, weight.scales, out=answer)


def integer_product(q: Tensor, codes: Tensor) -> Tensor:
    """(T, N) uint8 x (M, N) int8 -> (T, M) float32: the exact integers, rounded once, on every processor.

    Where torch has no such product, floats multiply ``EXACT`` columns at a time: every partial sum is an integer below
    2**24, so no order of adding rounds it.
    """
    if has_integer_product():
        integers = torch._int_mm(q, codes.T)
    else:
        pieces = zip(q.split(EXACT, dim=1), codes.split(EXACT, dim=1), strict=True)
        first, *rest = (piece.float() @ own.float().T for piece, own in pieces)
        if not rest:
            return first
        integers = first.to(torch.int32)
        for piece in rest:
            integers += piece.to(torch.int32)
    # The floats overwrite the integers: with many tokens, a second array costs as much as the product.
    return integers.view(torch.float32).copy_(integers)


@functools.cache
def has_integer_product() -> bool:
    """Whether torch has an exact and fast product of uint8 and int8 on this processor.

    Without AVX-512 it is a plain loop: with AVX2 15 to 30 times slower than the product of floats from 16 tokens on.
    x86 processors with AVX-512 but without VNNI add pairs of products in 16 bits, which saturate.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    left = torch.full((16, 256), 255, dtype=torch.uint8)
    right = torch.full((256, 16), 127, dtype=torch.int8)
    try:
        return all(bool((torch._int_mm(left[:rows], right) == 256 * 255 * 127).all()) for rows in (1, 16))
    except RuntimeError:
        return False
