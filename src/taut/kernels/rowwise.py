"""Token tables in 8 or 4 bits: one uint8 tensor, each group of a row followed by its own scale and bias.

The format is that of torch's ``quantized.embedding_bag_{byte,4bit}_rowwise_offsets`` (FBGEMM): the codes, for 4 bits
two in a byte with the earlier column in the low nibble, then a scale and a bias, float32 for 8 bits and float16 for
4. A value is code * scale + bias. A row of several groups is so many short rows behind each other:
the tensor is (V, groups, bytes of a group), which no dense table's shape equals.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taut.core.errors import TautError

LOOKUPS = {8: "embedding_bag_byte_rowwise_offsets", 4: "embedding_bag_4bit_rowwise_offsets"}
SHRINKS = tuple(1 - step / 20 for step in range(1, 11))
"""What the clip search tries to shrink a range by: .95, .90, ... .50."""
PACKED_AT_ONCE = 1 << 22
"""Numbers quantised at a time: bounds what packing a large table needs beside it."""


@dataclass(frozen=True)
class RowFormat:
    """``bits`` 8 or 4; rows of ``width`` D numbers, each ``group`` of which (a divisor of D) share a scale."""

    bits: int
    width: int
    group: int

    @property
    def groups(self) -> int:
        return self.width // self.group

    @property
    def scale_dtype(self) -> torch.dtype:
        return torch.float32 if self.bits == 8 else torch.float16

    @property
    def group_bytes(self) -> int:
        return self.group * self.bits // 8 + 2 * self.scale_dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.groups * self.group_bytes


def pack(table: Tensor, layout: RowFormat, symmetric: bool = False, clip: bool = False) -> Tensor:
    """(V, D) float -> packed (V, groups, ``group_bytes``) uint8. Deterministic.

    Scales and biases are rounded to their storage type before the codes are chosen, so every number inside the range
    comes back within half a step. ``symmetric`` centres the range on zero, which is then exact. ``clip`` gives up
    the largest numbers of a group where that lowers its squared error (a grid over the range; cf. Guan et al. 2019,
    arXiv 1911.02079). Raises TautError for numbers that are not finite or beyond what the scale's type can hold.
    """
    if not table.isfinite().all():
        raise TautError("the token table holds numbers that are not finite; repair it before packing")
    step = max(1, PACKED_AT_ONCE // layout.width)
    return torch.cat([_pack(rows, layout, symmetric, clip) for rows in table.detach().split(step)])


def fields(packed: Tensor, layout: RowFormat) -> tuple[Tensor, Tensor, Tensor]:
    """What is stored of each of the n = V * groups groups: code bytes (n, -) uint8, scale and bias (n, 1) float32."""
    codes, tail = packed.flatten(0, 1).split([layout.group * layout.bits // 8, 2 * layout.scale_dtype.itemsize], dim=1)
    # A copy, since a view as floats needs an aligned start.
    scale, bias = tail.clone(memory_format=torch.contiguous_format).view(layout.scale_dtype).float().split(1, dim=1)
    return codes, scale, bias


def unpack(packed: Tensor, layout: RowFormat) -> Tensor:
    """Packed (V, groups, ``group_bytes``) -> (V, D) float32: the plain formula, which the fused lookup must equal."""
    codes, scale, bias = fields(packed, layout)
    if layout.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    return torch.addcmul(bias, codes.float(), scale).reshape(-1, layout.width)


def lookup(packed: Tensor, ids: Tensor, layout: RowFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed (V, groups, ``group_bytes``) and (...) ids -> (..., D) of ``dtype``. Extra memory O(number of ids).

    FBGEMM's fused lookup on a CPU, else a gather and the plain formula on the gathered rows. Raises IndexError for
    an id outside the table (on CUDA the device asserts, as for torch's own lookup).
    """
    if torch.compiler.is_compiling():
        return _lookup(packed, ids, layout.bits, layout.width, layout.group, dtype)
    # FBGEMM reads ids as if they lay side by side.
    flat = ids.reshape(-1).long().contiguous()
    fused = getattr(torch.ops.quantized, LOOKUPS[layout.bits], None) if packed.device.type == "cpu" else None
    gathered = fused is None
    rows = unpack(packed.index_select(0, flat), layout) if gathered else _fused_lookup(fused, packed, flat, layout)
    return rows.to(dtype).reshape(*ids.shape, layout.width)


@torch.library.custom_op("taut::rowwise_lookup", mutates_args=())
def _lookup(packed: Tensor, ids: Tensor, bits: int, width: int, group: int, dtype: torch.dtype) -> Tensor:
    """``lookup``, opaque to compilers."""
    return lookup(packed, ids, RowFormat(bits, width, group), dtype)


@_lookup.register_fake
def _lookup_shape(packed: Tensor, ids: Tensor, bits: int, width: int, group: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(*ids.shape, width, dtype=dtype)


def _fused_lookup(fused: Any, packed: Tensor, ids: Tensor, layout: RowFormat) -> Tensor:
    """Bags of one group each: (n,) ids -> (n, D) float32."""
    count = ids.numel() * layout.groups
    if layout.groups > 1:
        ids = (ids[:, None] * layout.groups + torch.arange(layout.groups, device=ids.device)).reshape(-1)
    starts = torch.arange(count, device=ids.device)
    try:
        return fused(packed.flatten(0, 1), ids, starts).view(-1, layout.width)
    except RuntimeError as error:
        if "out of bounds" in str(error):
            raise IndexError(f"token id out of range: the table has {packed.shape[0]} rows") from None
        raise


def _pack(table: Tensor, layout: RowFormat, symmetric: bool, clip: bool) -> Tensor:
    numbers = table.float().reshape(-1, layout.group)
    low, high = numbers.aminmax(dim=1, keepdim=True)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    codes, scale, bias = _quantise(numbers, low, high, layout, symmetric)
    if clip:
        error = _error(numbers, codes, scale, bias)
        for shrink in SHRINKS:
            cut = (high - low) * (1 - shrink) / 2
            trial = _quantise(numbers, low + cut, high - cut, layout, symmetric)
            trial_error = _error(numbers, *trial)
            better = trial_error < error
            error = torch.where(better, trial_error, error)
            codes, scale, bias = (torch.where(better, *pair) for pair in zip(trial, (codes, scale, bias), strict=True))
    if layout.bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    tail = torch.cat((scale, bias), dim=1).view(torch.uint8)
    return torch.cat((codes, tail), dim=1).view(-1, layout.groups, layout.group_bytes)


def _quantise(
    numbers: Tensor, low: Tensor, high: Tensor, layout: RowFormat, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(n, G) float32 and ranges (n, 1) -> codes (n, G) uint8, scales and biases (n, 1) as stored."""
    top, middle = 2**layout.bits - 1, 2 ** (layout.bits - 1)
    if symmetric:
        scale = _nonzero((high / (middle - 1)).to(layout.scale_dtype))
        bias = scale * -middle
        codes = (numbers / scale.float()).round_().add_(middle).clamp_(1, top)
    else:
        bias = _not_above(low, layout.scale_dtype)
        scale = _nonzero(((high - bias.float()) / top).to(layout.scale_dtype))
        codes = ((numbers - bias.float()) / scale.float()).round_().clamp_(0, top)
    if not (scale.isfinite().all() and bias.isfinite().all()):
        raise TautError(
            f"the token table holds numbers up to {float(high.max()):.3g}, beyond the {layout.scale_dtype} scales of "
            f"{layout.bits}-bit rows{'; use bits: 8' if layout.bits == 4 else ''}"
        )
    return codes.to(torch.uint8), scale, bias


def _nonzero(scale: Tensor) -> Tensor:
    """A group of equal numbers has no range: any step will do."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _not_above(low: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 rounded downwards to ``dtype``, so that no number lies below the range. float16 keeps 10 of 23 bits."""
    if dtype == torch.float32:
        return low
    bits = low.contiguous().view(torch.int32)
    kept = bits & ~0x1FFF
    kept += torch.where((low < 0) & (kept != bits), 0x2000, 0)
    return kept.view(torch.float32).to(dtype)


def _error(numbers: Tensor, codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Squared error of each group, (n, 1)."""
    return (torch.addcmul(bias.float(), codes.float(), scale.float()) - numbers).square_().sum(1, keepdim=True)
