"""Token tables in few bits: one uint8 tensor, in which each group of a row is followed by its own scale.

A group begins with its codes, earlier columns in the lower bits of a byte. Then come the bytes that ``formats`` stores
for its scale. Codes of 6 and of 3 bits are split into two planes: the lower four (two) bits of every number, then the
upper two (one). For integers of 8, 4 and 2 bits this is the format of torch's
``quantized.embedding_bag_{byte,4bit,2bit}_rowwise_offsets`` (FBGEMM): codes, then a scale and a bias, float32 for 8
bits and float16 for fewer. A value is code * scale + bias. A row of several groups is stored as that many short rows.
The tensor has the shape (V, groups, bytes of a group), which no dense table has.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError
from taut.ops.codebooks.gather import gather_rows
from taut.ops.quantization.formats import NumberFormat, number_format

LOOKUPS = {
    8: "embedding_bag_byte_rowwise_offsets",
    4: "embedding_bag_4bit_rowwise_offsets",
    2: "embedding_bag_2bit_rowwise_offsets",
}
PLANES = {8: (8,), 6: (4, 2), 4: (4,), 3: (2, 1), 2: (2,)}
"""How many bits of a code each plane holds, lowest bits first. Each number divides 8, so bytes are filled exactly."""
PACKED_AT_ONCE = 1 << 18
"""Numbers quantised at a time: bounds the extra memory for packing a large table, and fits in the cache."""
EXPANDED_AT_ONCE = {"cpu": 1 << 19}
"""Numbers expanded at a time by the plain formula. On a CPU they stay in the cache between the steps."""
EXPANDED_ELSEWHERE = 1 << 28


@dataclass(frozen=True)
class RowFormat:
    """Rows of ``width`` D numbers of ``bits`` each. Every ``group`` of them share a scale; the last group may be
    short. ``number`` names the format of a number (``ops.quantization.formats.FORMATS``)."""

    bits: int
    width: int
    group: int
    number: str = "int"

    @property
    def format(self) -> NumberFormat:
        return number_format(self.number, self.bits)

    @property
    def groups(self) -> int:
        return -(-self.width // self.group)

    @property
    def plane_bytes(self) -> list[int]:
        """Bytes of a group's codes, plane by plane."""
        return [-(-self.group * bits // 8) for bits in PLANES[self.bits]]

    @property
    def padded_group(self) -> int:
        """How many numbers fit in the bytes of a group, if there is one plane."""
        return self.plane_bytes[0] * 8 // self.bits

    @property
    def group_bytes(self) -> int:
        return sum(self.plane_bytes) + self.format.tail_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, that is of a token."""
        return self.groups * self.group_bytes


def pack(table: Tensor, layout: RowFormat, symmetric: bool = False, clip: bool = False) -> Tensor:
    """(V, D) float -> packed (V, groups, ``group_bytes``) uint8. Deterministic.

    Scales and biases are rounded to their storage type before the codes are chosen. So with integers, every number
    inside the range comes back within half a step. ``symmetric`` centres the range of integers on zero, which is then
    exact. ``clip`` tries the format's other scales for each group and keeps the one with the least squared error.
    Raises TautError for numbers that are not finite or beyond what the scale's type can hold.
    """
    if not table.isfinite().all():
        raise TautError("the weight holds numbers that are not finite; repair it before packing")
    step = max(1, PACKED_AT_ONCE // layout.width)
    return torch.cat([_pack(rows, layout, symmetric, clip) for rows in table.detach().split(step)])


def repack(table: Tensor, packed: Tensor, layout: RowFormat) -> Tensor:
    """(V, D) float -> packed, like ``pack``, but with the scales and biases of ``packed``: the nearest codes under
    these. The output of ``unpack`` gives ``packed`` back unchanged."""
    step = max(1, PACKED_AT_ONCE // layout.width)
    pieces = zip(table.detach().split(step), packed.split(step), strict=True)
    return torch.cat([_repack(rows, old, layout) for rows, old in pieces])


def unpack(packed: Tensor, layout: RowFormat) -> Tensor:
    """Packed (V, groups, ``group_bytes``) -> (V, D) float32: the plain formula, which the fused lookup must equal."""
    pieces = packed.split(_rows_at_once(packed, layout))
    return _expand(pieces, packed.shape[0], layout, packed.device)


def lookup(packed: Tensor, ids: Tensor, layout: RowFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """Packed (V, groups, ``group_bytes``) and (...) ids -> (..., D) of ``dtype``. Extra memory O(number of ids).

    On a CPU, integers of 8, 4 and 2 bits use FBGEMM's fused lookup. Otherwise rows are gathered and expanded by the
    plain formula. Raises IndexError for an id outside the table (on CUDA the device asserts).
    """
    if torch.compiler.is_compiling():
        return _lookup(packed, ids, layout.bits, layout.width, layout.group, layout.number, dtype)
    # FBGEMM assumes that the ids are contiguous.
    flat = ids.reshape(-1).long().contiguous()
    try:
        if layout.number == "int" and layout.bits in LOOKUPS and packed.device.type == "cpu":
            rows = _fused_lookup(packed, flat, layout)
        else:
            pieces = (packed.index_select(0, piece) for piece in flat.split(_rows_at_once(packed, layout)))
            rows = _expand(pieces, flat.numel(), layout, packed.device)
    except (RuntimeError, IndexError) as error:
        if "out of bounds" in str(error) or "out of range" in str(error):
            raise IndexError(f"token id out of range: the table has {packed.shape[0]} rows") from None
        raise
    return rows.to(dtype).reshape(*ids.shape, layout.width)


@torch.library.custom_op("taut::rowwise_lookup", mutates_args=())
def _lookup(packed: Tensor, ids: Tensor, bits: int, width: int, group: int, number: str, dtype: torch.dtype) -> Tensor:
    """``lookup``, opaque to compilers."""
    return lookup(packed, ids, RowFormat(bits, width, group, number), dtype)


@_lookup.register_fake
def _lookup_shape(
    packed: Tensor, ids: Tensor, bits: int, width: int, group: int, number: str, dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(*ids.shape, width, dtype=dtype)


def fields(packed: Tensor, layout: RowFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """The contents of the n = V * groups groups: code bytes (n, -) uint8, scale and bias (n, 1) float32. The bias is
    None if the format has none."""
    codes, tail = packed.flatten(0, 1).split([sum(layout.plane_bytes), layout.format.tail_bytes], dim=1)
    return codes, *layout.format.scales(tail)


def _fused_lookup(packed: Tensor, ids: Tensor, layout: RowFormat) -> Tensor:
    """Bags of one group each: (n,) ids -> (n, D) float32. Few calls: with some hundred ids they take half the time."""
    groups = packed.shape[1]
    if groups > 1:
        ids = torch.arange(groups, device=ids.device).add(ids[:, None], alpha=groups).view(-1)
    fused = getattr(torch.ops.quantized, LOOKUPS[layout.bits])
    rows = fused(packed.flatten(0, 1), ids, torch.arange(ids.shape[0], device=ids.device))
    if rows.shape[1] * groups == layout.width:
        return rows.view(-1, layout.width)
    return rows[:, : layout.group].reshape(-1, groups * layout.group)[:, : layout.width]


def _rows_at_once(packed: Tensor, layout: RowFormat) -> int:
    return max(1, EXPANDED_AT_ONCE.get(packed.device.type, EXPANDED_ELSEWHERE) // layout.width)


def _expand(pieces: Iterable[Tensor], count: int, layout: RowFormat, device: torch.device) -> Tensor:
    """Packed rows in pieces, ``count`` in all -> (``count``, D) float32."""
    rows = torch.empty(count, layout.groups * layout.group, device=device)
    start = 0
    for piece in pieces:
        codes, scale, bias = fields(piece, layout)
        target = rows[start : start + piece.shape[0]].view(-1, layout.group)
        torch.mul(_levels(codes, layout)[:, : layout.group], scale, out=target)
        if bias is not None:
            target.add_(bias)
        start += piece.shape[0]
    return rows[:, : layout.width]


def _levels(codes: Tensor, layout: RowFormat) -> Tensor:
    """(n, bytes) -> (n, at least ``group``) float32: the level of each code, read from a table byte by byte."""
    if layout.bits == 8:
        return codes.float()
    planes = codes.split(layout.plane_bytes, dim=1)
    if len(planes) == 1:
        return _read(codes, _levels_of_bytes(layout.number, layout.bits, codes.device))
    lower, upper = PLANES[layout.bits]
    low, high = _codes_of_bytes(lower, 0, codes.device), _codes_of_bytes(upper, lower, codes.device)
    # Only integers have two planes, and there a code equals its level.
    return (_read(planes[0], low)[:, : layout.group] | _read(planes[1], high)[:, : layout.group]).float()


def _read(plane: Tensor, table: Tensor) -> Tensor:
    """(n, bytes) and a table of the k numbers in each byte (256, k) -> (n, bytes * k)."""
    return gather_rows(plane.int().view(-1), table).view(plane.shape[0], plane.shape[1] * table.shape[1])


@cache
def _codes_of_bytes(bits: int, shift: int, device: torch.device) -> Tensor:
    """(256, 8 / ``bits``) uint8: the codes in each byte, times 2 ** ``shift``."""
    places = torch.arange(0, 8, bits, device=device)
    codes = torch.arange(256, device=device)[:, None] >> places & (1 << bits) - 1
    return (codes << shift).to(torch.uint8)


@cache
def _levels_of_bytes(number: str, bits: int, device: torch.device) -> Tensor:
    """(256, 8 / ``bits``) float32: the levels of the codes in each byte."""
    return number_format(number, bits).levels(device)[_codes_of_bytes(bits, 0, device).int()]


def _pack(table: Tensor, layout: RowFormat, symmetric: bool, clip: bool) -> Tensor:
    numbers, form = _blocks(table, layout), layout.format
    codes, tail = form.quantise(numbers, 1.0, symmetric)
    if clip:
        error = _error(numbers, form.dequantise(codes, tail), layout)
        for factor in form.factors:
            trial = form.quantise(numbers, factor, symmetric)
            trial_error = _error(numbers, form.dequantise(*trial), layout)
            better = trial_error < error
            error = torch.where(better, trial_error, error)
            codes, tail = torch.where(better, trial[0], codes), torch.where(better, trial[1], tail)
    return torch.cat((_pack_codes(codes, layout), tail), dim=1).view(-1, layout.groups, layout.group_bytes)


def _repack(table: Tensor, packed: Tensor, layout: RowFormat) -> Tensor:
    _, scale, bias = fields(packed, layout)
    codes = _pack_codes(layout.format.nearest(_blocks(table, layout), scale, bias), layout)
    tail = packed.flatten(0, 1)[:, codes.shape[1] :]
    return torch.cat((codes, tail), dim=1).view(-1, layout.groups, layout.group_bytes)


def _blocks(table: Tensor, layout: RowFormat) -> Tensor:
    """(n, D) float -> (n * groups, group) float32."""
    numbers = table.float()
    missing = layout.groups * layout.group - layout.width
    if missing:
        # Pad with the last number, because that changes no range.
        numbers = torch.cat((numbers, numbers[:, -1:].expand(-1, missing)), dim=1)
    return numbers.reshape(-1, layout.group)


def _error(numbers: Tensor, back: Tensor, layout: RowFormat) -> Tensor:
    """Squared error of each group, (n, 1). The padding of a last group does not count."""
    squares = back.sub_(numbers).square_().view(-1, layout.groups * layout.group)
    squares[:, layout.width :] = 0
    return squares.view(-1, layout.group).sum(1, keepdim=True)


def _pack_codes(codes: Tensor, layout: RowFormat) -> Tensor:
    """(n, G) uint8, one code in each -> (n, bytes)."""
    planes, shift = [], 0
    for bits in PLANES[layout.bits]:
        plane, in_a_byte = codes >> shift & (1 << bits) - 1, 8 // bits
        shares = F.pad(plane, (0, -layout.group % in_a_byte)).unflatten(1, (-1, in_a_byte)).unbind(-1)
        packed = shares[0]
        for place, share in enumerate(shares[1:], start=1):
            packed = packed | share << place * bits
        planes.append(packed)
        shift += bits
    return torch.cat(planes, dim=1)
