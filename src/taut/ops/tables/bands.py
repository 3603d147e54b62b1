"""Rows in classes, with one stored block per class: the map from a row to its place in a block.

Only the class of a row is stored, in ceil(log2 C) bits. A row's place in the block is its rank among the rows of its
class, so a block keeps its rows in order.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Reader = Callable[[Tensor], Tensor]
"""From (n,) int32 places within one class to (n, D) vectors."""


def map_bytes(rows: int, count: int) -> int:
    """Bytes of the packed classes of ``rows`` rows, each in one of ``count`` classes. Zero for a single class."""
    return -(-rows * (count - 1).bit_length() // 8)


def pack_classes(classes: Tensor, count: int) -> Tensor:
    """(V,) integers below ``count`` C -> (``map_bytes``,) uint8, lowest bit first, no gap between rows."""
    width = (count - 1).bit_length()
    bits = (classes.long()[:, None] >> torch.arange(width, device=classes.device)) & 1
    padded = bits.new_zeros(map_bytes(len(classes), count) * 8)
    padded[: bits.numel()] = bits.flatten()
    return (padded.view(-1, 8) << torch.arange(8, device=bits.device)).sum(1).to(torch.uint8)


def places(packed: Tensor, count: int, rows: int) -> tuple[Tensor, Tensor]:
    """The inverse of ``pack_classes``: (V,) uint8 classes, and (V,) int32 ranks of the rows within their classes."""
    width = (count - 1).bit_length()
    bits = (packed[:, None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    bits = bits.flatten()[: rows * width].view(rows, width).long()
    classes = (bits << torch.arange(width, device=packed.device)).sum(1)
    order = classes.argsort(stable=True)
    sizes = torch.bincount(classes, minlength=count)
    ranks = torch.arange(rows, device=packed.device) - (sizes.cumsum(0) - sizes)[classes[order]]
    offsets = torch.empty_like(ranks).index_copy_(0, order, ranks)
    return classes.to(torch.uint8), offsets.int()


def banded(
    ids: Tensor, classes: Tensor, offsets: Tensor, readers: Sequence[Reader], width: int, dtype: torch.dtype
) -> Tensor:
    """Look up (...) ids, each with the reader of its class: (..., ``width``) of ``dtype``.

    A class without any of the ids is skipped, except while gradients are recorded. Then its parameters receive zeros,
    as those of a table do. Raises IndexError for an id outside the table.
    """
    flat = ids.reshape(-1)
    kinds, ranks = classes.index_select(0, flat), offsets.index_select(0, flat)
    vectors = torch.empty(len(flat), width, dtype=dtype, device=ids.device)
    for kind, reader in enumerate(readers):
        where = (kinds == kind).nonzero().squeeze(1)
        if len(where) or torch.is_grad_enabled():
            vectors.index_copy_(0, where, reader(ranks.index_select(0, where)).to(dtype))
    return vectors.view(*ids.shape, width)
