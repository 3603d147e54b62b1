"""Rows that are like sentence vectors, for the tests of their codes and of their indexes."""

import torch
from torch import Tensor
from torch.nn import functional as F

ODD = 42
"""A width that is no multiple of 8 or 4."""


def units(count: int, width: int, seed: int = 0) -> Tensor:
    """Rows that lie unevenly, as sentence vectors do."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(2, 0.2, width)[torch.randperm(width, generator=generator)]
    return F.normalize(torch.randn(count, width, generator=generator) * spread + 0.3, dim=1)


def mean_squared_gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).square().mean())
