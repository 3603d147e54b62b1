"""Gather short rows of a small table by number, as codebooks, hashed tables and tensor-train cores need it.

torch makes one call per copied row, which costs more than the copying if a row has few numbers. A row of 2, 4, 8 or 16
bytes is therefore read as one wide number, because torch gathers single numbers in a tight loop.
"""

from typing import Any

import torch
from torch import Tensor

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""Bytes of a row -> a dtype of the same width. Such numbers are only copied, never computed with."""


def gather_rows(codes: Tensor, table: Tensor) -> Tensor:
    """Rows of ``table`` (C, w), one for each of ``codes`` (n,), any integer dtype: (n, w) of the table's dtype.

    Differentiable in ``table``; the gradient is summed in the order of ``codes``, so on a CPU it is the same to the
    bit every time. Raises IndexError for a code outside the table (on CUDA the device asserts).
    """
    if codes.dtype not in (torch.int32, torch.int64):
        codes = codes.int()
    if table.device.type != "cpu" or torch.compiler.is_compiling():
        return table.index_select(0, codes)
    return _Gather.apply(codes, table)


class _Gather(torch.autograd.Function):
    """``index_select`` over whole rows, with its own gradient, because a view as another dtype has none."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.shape = table.shape
        return read_rows(codes, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (codes,) = ctx.saved_tensors
        # With 32-bit places, torch makes one call per row, which is six times slower.
        return None, gradient.new_zeros(ctx.shape).index_add_(0, codes.long(), gradient)


def read_rows(codes: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """``gather_rows`` on a CPU without a gradient. Codes are int32 or int64; ``out`` (n, w), if any, is contiguous."""
    try:
        word = WORDS.get(table.shape[1] * table.itemsize)
        if word is None or not _aligned(table) or (out is not None and not _aligned(out)):
            return torch.index_select(table, 0, codes, out=out)
        flat = None if out is None else out.view(word).view(-1)
        rows = torch.index_select(table.view(word).view(-1), 0, codes, out=flat)
        return rows.view(table.dtype).view(-1, table.shape[1])
    except (IndexError, RuntimeError) as error:
        if "out of range" in str(error) or "out of bounds" in str(error):
            raise IndexError(f"code out of range: the table has {table.shape[0]} rows") from None
        raise


def _aligned(rows: Tensor) -> bool:
    """Whether every row is aligned for a number as wide as a row, both in its storage and in memory."""
    size = rows.shape[1] * rows.itemsize
    return rows.is_contiguous() and rows.storage_offset() % rows.shape[1] == 0 and rows.data_ptr() % size == 0
