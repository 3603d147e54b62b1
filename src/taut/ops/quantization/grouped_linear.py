"""Linear maps with 2 to 8 bits per weight and unrounded inputs.

The transposed weight is stored like a token table, with one row per input. The product is a bag lookup of these rows,
in which x gives the weights. A map (M, N) is one int8 tensor (blocks, N, bytes of a group). Each block covers ``group``
outputs and holds for each input the codes of those outputs and their scale, as ``rowwise`` packs a row. So a group of
outputs is a sum of rows times the numbers of x. FBGEMM's lookup of integers in 8, 4 and 2 bits computes it in one pass
over the codes. No two inputs share a scale, however much their magnitudes differ.

For many tokens, and for other formats, a few blocks at a time are expanded and multiplied while they are in the cache.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from taut.ops.quantization import rowwise
from taut.ops.quantization.packed_gradients import register_gradients
from taut.ops.quantization.rowwise import LOOKUPS, RowFormat, fields

EXPANDED_AT_ONCE = {"cpu": 1 << 19}
"""Weights expanded at a time. On a CPU they stay in the cache between expansion and product."""
EXPANDED_ELSEWHERE = 1 << 24
FEW_TOKENS = 6
"""Up to this many tokens are multiplied with the codes one by one. With more, reading the codes again costs more than
expanding them."""


@dataclass(frozen=True)
class GroupFormat:
    """A map of ``outputs`` x ``inputs``. For each input, the weights of ``group`` neighbouring outputs share a scale.
    The last group is filled up by repeating the last output."""

    outputs: int
    inputs: int
    bits: int
    group: int
    number: str = "int"

    @cached_property
    def row(self) -> RowFormat:
        return RowFormat(self.bits, self.group, self.group, self.number)

    @cached_property
    def blocks(self) -> int:
        return -(-self.outputs // self.group)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of the packed tensor, int8."""
        return self.blocks, self.inputs, self.row.group_bytes

    @cached_property
    def fused(self) -> bool:
        """Whether FBGEMM can multiply these codes without expanding them."""
        return self.number == "int" and self.bits in LOOKUPS and self.group * self.bits % 8 == 0

    def pack(self, weight: Tensor, symmetric: bool = False, clip: bool = False) -> Tensor:
        """(M, N) float -> packed ``shape``; see ``rowwise.pack``. Deterministic."""
        return self._packed(rowwise.pack(self._rows(weight), self.row, symmetric, clip))

    def repack(self, weight: Tensor, packed: Tensor) -> Tensor:
        """(M, N) float -> packed ``shape``: the nearest codes under the scales of ``packed``."""
        return self._packed(rowwise.repack(self._rows(weight), self.flat(packed), self.row))

    def rounder(self, packed: Tensor) -> Callable[[Tensor, int], Tensor]:
        """The rounding of ``repack`` for one column, (M,) and the input's index -> (M,), for ``gptq.compensate``."""
        form, shape = self.row.format, (self.blocks, self.inputs, 1)
        _, scale, bias = fields(self.flat(packed), self.row)
        scale, bias = scale.view(shape), None if bias is None else bias.view(shape)

        def rounded(column: Tensor, index: int) -> Tensor:
            numbers = column.float()
            filled = torch.cat((numbers, numbers[-1:].expand(self.blocks * self.group - self.outputs)))
            scale_and_bias = scale[:, index], None if bias is None else bias[:, index]
            codes = form.nearest(filled.reshape(self.blocks, self.group), *scale_and_bias)
            return form.decode(codes, *scale_and_bias).view(-1)[: self.outputs].to(column.dtype)

        return rounded

    def expand(self, packed: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense equivalent (M, N) of ``dtype``: the plain formula, which every product must equal."""
        rows = rowwise.unpack(self.flat(packed), self.row).view(self.blocks, self.inputs, self.group)
        return rows.transpose(1, 2).reshape(-1, self.inputs)[: self.outputs].to(dtype)

    def _rows(self, weight: Tensor) -> Tensor:
        """(M, N) -> (blocks * N, group)."""
        missing = self.blocks * self.group - self.outputs
        filled = torch.cat((weight, weight[-1:].expand(missing, -1))) if missing else weight
        return filled.reshape(self.blocks, self.group, self.inputs).transpose(1, 2).contiguous().view(-1, self.group)

    def flat(self, packed: Tensor) -> Tensor:
        """The packed tensor in the shape that ``rowwise`` uses: (blocks * N, 1, bytes) uint8."""
        return packed.view(torch.uint8).view(-1, 1, packed.shape[2])

    def _packed(self, rows: Tensor) -> Tensor:
        return rows.view(torch.int8).view(self.shape)


def linear(x: Tensor, packed: Tensor, form: GroupFormat, bias: Tensor | None = None) -> Tensor:
    """(..., N) x packed (M, N) + bias (M,) -> (..., M), in the dtype of ``x``: exact up to rounding, gradient included.

    Computed in float32 on a CPU (float64 for float64), elsewhere in the dtype of ``x``. Extra memory O(answer); the
    whole weight is never expanded.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _linear(x, bias, packed, form.outputs, form.bits, form.group, form.number)
    # A custom operator costs about 20 microseconds, a third of a small map with one token.
    return _forward(x, bias, packed, form)


@torch.library.custom_op("taut::low_bit_linear", mutates_args=())
def _linear(x: Tensor, bias: Tensor | None, packed: Tensor, outputs: int, bits: int, group: int, number: str) -> Tensor:
    """Opaque to compilers."""
    return _forward(x, bias, packed, GroupFormat(outputs, x.shape[-1], bits, group, number))


@_linear.register_fake
def _linear_shape(
    x: Tensor, bias: Tensor | None, packed: Tensor, outputs: int, bits: int, group: int, number: str
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.custom_op("taut::low_bit_linear_gradient", mutates_args=())
def _input_gradient(gradient: Tensor, packed: Tensor, outputs: int, bits: int, group: int, number: str) -> Tensor:
    """The gradient of the outputs (..., M) -> that of the inputs (..., N)."""
    form = GroupFormat(outputs, packed.shape[1], bits, group, number)
    flat = gradient.reshape(-1, outputs)
    total = flat.new_zeros(flat.shape[0], form.inputs)
    for start, block in _pieces(packed, form, flat.dtype):
        share = flat[:, start : start + block.shape[1]]
        total.addmm_(share, block[:, : share.shape[1]].T)
    return total.view(*gradient.shape[:-1], form.inputs)


@_input_gradient.register_fake
def _input_gradient_shape(gradient: Tensor, packed: Tensor, outputs: int, bits: int, group: int, number: str) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], packed.shape[1])


register_gradients(_linear, _input_gradient, bias=True)


def _forward(x: Tensor, bias: Tensor | None, packed: Tensor, form: GroupFormat) -> Tensor:
    # Few operations: with one token, each costs a tenth of the arithmetic of a small map.
    tokens, dtype = x.reshape(-1, form.inputs), x.dtype
    on_cpu = packed.device.type == "cpu"
    if on_cpu and dtype != torch.float64:
        tokens = tokens.float()
    if form.fused and on_cpu and tokens.dtype == torch.float32 and 0 < len(tokens) <= FEW_TOKENS:
        answer = _by_bags(tokens, packed, form)
    else:
        answer = tokens.new_empty(len(tokens), form.outputs)
        for start, block in _pieces(packed, form, tokens.dtype):
            share = answer[:, start : start + block.shape[1]]
            torch.mm(tokens, block[:, : share.shape[1]], out=share)
    if bias is not None:
        answer += bias
    return answer.to(dtype).view(*x.shape[:-1], form.outputs)


def _by_bags(tokens: Tensor, packed: Tensor, form: GroupFormat) -> Tensor:
    """(T, N) float32 -> (T, M). A bag gives one block of outputs: the sum of its rows times a token's numbers."""
    operator = getattr(torch.ops.quantized, LOOKUPS[form.bits])
    rows, (ids, offsets) = packed.view(torch.uint8).flatten(0, 1), _bags(form.blocks, form.inputs)
    answers = [
        operator(rows, ids, offsets, False, 0, False, token.expand(form.blocks, form.inputs).reshape(-1)).view(1, -1)
        for token in (tokens.split(1) if len(tokens) > 1 else (tokens,))
    ]
    answer = answers[0] if len(answers) == 1 else torch.cat(answers)
    return answer if answer.shape[1] == form.outputs else answer[:, : form.outputs].contiguous()


@cache
def _bags(blocks: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Every row in order, and where a bag begins. Cached, because making them takes a tenth of the product's time."""
    rows = blocks * inputs
    return tuple(torch.arange(0, rows, step, dtype=torch.int32, device="cpu") for step in (1, inputs))


def _pieces(packed: Tensor, form: GroupFormat, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The map expanded a few blocks at a time: (first output, (N, outputs of those blocks) of ``dtype``)."""
    rows, device = form.flat(packed), packed.device
    at_once = EXPANDED_AT_ONCE.get(device.type, EXPANDED_ELSEWHERE) // (form.inputs * form.group)
    count = min(max(1, at_once), form.blocks)
    ids = torch.arange(form.inputs, device=device)[:, None] + torch.arange(count, device=device) * form.inputs
    for block in range(0, form.blocks, count):
        # For each input, the numbers of all chosen blocks: the rows of a dense matrix.
        chosen = ids[:, : form.blocks - block]
        expanded = rowwise.lookup(rows[block * form.inputs :], chosen, form.row, dtype)
        yield block * form.group, expanded.flatten(1)
