"""Pack whole numbers of a fixed number of bits without gaps, and read them one by one."""

import torch
from torch import Tensor

MOST_BITS = 25
"""The most bits of a number that always lies within four bytes, wherever in a byte it starts."""


def bits_below(count: int) -> int:
    """The number of bits that store 0 ... ``count`` - 1, at least one."""
    return max(1, (count - 1).bit_length())


def packed_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def pack_integers(values: Tensor, bits: int) -> Tensor:
    """Pack (n,) integers of ``bits`` <= 25 into (``packed_bytes``,) uint8, lowest bit first."""
    flags = (values.long()[:, None] >> torch.arange(bits, device=values.device)) & 1
    padded = flags.new_zeros(packed_bytes(len(values), bits) * 8)
    padded[: flags.numel()] = flags.flatten()
    return (padded.view(-1, 8) << torch.arange(8, device=values.device)).sum(1).to(torch.uint8)


def read_integers(packed: Tensor, places: Tensor, bits: int) -> Tensor:
    """Read the numbers at ``places`` (n,) int64: (n,) int64. Extra memory O(n)."""
    start = places * bits
    window = (start >> 3)[:, None] + torch.arange(4, device=packed.device)
    # Bytes beyond the end hold only bits that the mask removes, so any byte can stand in for them.
    words = packed.take(window.clamp_max(len(packed) - 1)).long() << (torch.arange(4, device=packed.device) * 8)
    return (words.sum(1) >> (start & 7)) & ((1 << bits) - 1)
