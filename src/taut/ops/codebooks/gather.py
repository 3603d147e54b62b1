"""Short rows of a small table by number: what codebooks, hashed tables and tensor-train cores are read with.

torch copies a row by a call of its own, which for rows of a few numbers costs more than the copying. A row of 2, 4, 8
or 16 bytes is therefore read as one wide number, and a gather of single numbers is a tight loop.
"""

from typing import Any

import torch
from torch import Tensor

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""The number as wide as a row of so many bytes. Only ever copied."""


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
    """``index_select`` over whole rows, with its own gradient, since a view as other numbers has none."""

    @staticmethod
    def forward(ctx: Any, codes: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.shape = table.shape
        return read_rows(codes, table)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (codes,) = ctx.saved_tensors
        # With 32-bit places torch adds a row by a call of its own, six times slower.
        return None, gradient.new_zeros(ctx.shape).index_add_(0, codes.long(), gradient)


def read_rows(codes: Tensor, table: Tensor, out: Tensor | None = None) -> Tensor:
    """``gather_rows`` on a CPU without a gradient, codes int32 or int64; into ``out`` (n, w), contiguous, if given."""
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
    """Whether every row starts where a number as wide as a row may start: in its storage, and in memory."""
    size = rows.shape[1] * rows.itemsize
    return rows.is_contiguous() and rows.storage_offset() % rows.shape[1] == 0 and rows.data_ptr() % size == 0
