"""The output map tied to a low-bit token table: scores h W^T, without ever holding W dense.

With many tokens, the table is expanded some hundred rows at a time, and each piece is multiplied while it is in the
cache. With few tokens, expanding would cost more than the product. Then h is written with three digits of base 254, so
h W^T becomes three exact integer products with the stored codes. Three digits resolve h to 2^-23 of its largest entry,
as float32 does.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from taut.ops.quantization.int8_linear import has_integer_product
from taut.ops.quantization.packed_gradients import register_gradients
from taut.ops.quantization.rowwise import RowFormat, fields, lookup

EXPANDED_AT_ONCE = {"cpu": 1 << 19}
"""Numbers of the table expanded at a time. On a CPU they stay in the cache between expansion and product."""
EXPANDED_ELSEWHERE = 1 << 24
CODES_AT_ONCE = 1 << 22
"""Numbers of the table multiplied at a time by all digits of h: their codes stay in the last-level cache."""
DIGITS, BASE = 3, 254
FEW_TOKENS = 3
"""Up to this many tokens are multiplied digit by digit."""


def logits(hidden: Tensor, packed: Tensor, layout: RowFormat) -> Tensor:
    """Scores of a head tied to the table: (..., D) -> (..., V), in the dtype of ``hidden``.

    Exact up to rounding, gradient included; extra memory O(number of scores).
    """
    return _tied_head(hidden, packed, layout.bits, layout.width, layout.group, layout.number)


@torch.library.custom_op("taut::rowwise_tied_head", mutates_args=())
def _tied_head(hidden: Tensor, packed: Tensor, bits: int, width: int, group: int, number: str) -> Tensor:
    """``logits``, opaque to compilers."""
    layout, flat = RowFormat(bits, width, group, number), hidden.reshape(-1, width)
    scores = flat.new_empty(flat.shape[0], packed.shape[0])
    if (
        0 < flat.shape[0] <= FEW_TOKENS
        and layout.groups == 1
        and number == "int"
        and 8 % bits == 0
        and packed.device.type == "cpu"
        and has_integer_product()
    ):
        _by_digits(flat.float(), packed, layout, scores)
    else:
        for start, rows in _pieces(packed, layout, hidden.dtype):
            scores[:, start : start + rows.shape[0]] = flat @ rows.T
    return scores.view(*hidden.shape[:-1], packed.shape[0])


@_tied_head.register_fake
def _tied_head_shape(hidden: Tensor, packed: Tensor, bits: int, width: int, group: int, number: str) -> Tensor:
    return hidden.new_empty(*hidden.shape[:-1], packed.shape[0])


@torch.library.custom_op("taut::rowwise_tied_head_gradient", mutates_args=())
def _tied_head_gradient(gradient: Tensor, packed: Tensor, bits: int, width: int, group: int, number: str) -> Tensor:
    """The gradient of the scores (..., V) -> that of the hidden states (..., D)."""
    flat = gradient.reshape(-1, packed.shape[0])
    total = flat.new_zeros(flat.shape[0], width)
    for start, rows in _pieces(packed, RowFormat(bits, width, group, number), gradient.dtype):
        total.addmm_(flat[:, start : start + rows.shape[0]], rows)
    return total.view(*gradient.shape[:-1], width)


@_tied_head_gradient.register_fake
def _tied_head_gradient_shape(
    gradient: Tensor, packed: Tensor, bits: int, width: int, group: int, number: str
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], width)


@register_flop_formula([torch.ops.taut.rowwise_tied_head, torch.ops.taut.rowwise_tied_head_gradient])
def _tied_head_flops(shape: torch.Size, packed: torch.Size, bits: int, width: int, *rest: Any, **named: Any) -> int:
    """The FLOPs, for PyTorch's FLOP counter, which cannot look inside a custom operator."""
    return 2 * math.prod(shape[:-1]) * width * packed[0]


register_gradients(_tied_head, _tied_head_gradient, bias=False)


def _pieces(packed: Tensor, layout: RowFormat, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The table expanded piece by piece: (first row, (n, D) of ``dtype``)."""
    step = max(1, EXPANDED_AT_ONCE.get(packed.device.type, EXPANDED_ELSEWHERE) // layout.width)
    ids = torch.arange(min(step, packed.shape[0]), device=packed.device)
    for start in range(0, packed.shape[0], step):
        piece = packed[start : start + step]
        yield start, lookup(piece, ids[: piece.shape[0]], layout, dtype)


def _by_digits(hidden: Tensor, packed: Tensor, layout: RowFormat, scores: Tensor) -> None:
    """(T, D) float32 -> ``scores`` (T, V). One product for each token and digit: a single column is the fast case."""
    unit = hidden.abs().amax(dim=1, keepdim=True) / 127
    rest = hidden / torch.where(unit == 0, 1.0, unit)
    digits = []
    for _ in range(DIGITS):
        digits.append(rest.round())
        rest = (rest - digits[-1]) * BASE
    # The padding of a group gets zeros, so it adds nothing.
    columns = F.pad(torch.stack(digits).to(torch.int8), (0, layout.padded_group - layout.width))
    in_a_byte, mask = 8 // layout.bits, 2**layout.bits - 1
    totals = hidden.sum(dim=1)
    step = max(1, CODES_AT_ONCE // layout.width)
    for start in range(0, packed.shape[0], step):
        codes, scale, bias = fields(packed[start : start + step], layout)
        shares = [
            (codes if in_a_byte == 1 else codes >> place * layout.bits & mask, columns[..., place::in_a_byte])
            for place in range(in_a_byte)
        ]
        for token in range(hidden.shape[0]):
            total = torch.zeros_like(scale)
            for digit in range(DIGITS):
                for part, column in shares:
                    total.add_(
                        torch._int_mm(part, column[digit, token, :, None].contiguous()), alpha=float(BASE) ** -digit
                    )
            score = torch.addcmul(bias * totals[token], total, scale * unit[token])
            scores[token, start : start + step] = score[:, 0]
