"""A basis for product codes: principal directions in groups whose variances have nearly equal products."""

import math

import torch
from torch import Tensor

from taut.ops.factors.svd import leading_directions

FLOOR = 1e-9
"""Share of the largest variance below which a variance counts as zero."""


def coding_basis(rows: Tensor, weight: Tensor, rank: int, subvectors: int) -> Tensor:
    """The ``rank`` R principal directions of weighted rows, (V, D) and (V,) -> (R, D) float64, orthonormal.

    They come in ``subvectors`` groups (a divisor of R) of equal size, whose variances have nearly the same product.
    This is the greedy rule of Ge et al. 2013, Optimized Product Quantization, section 3.2.
    """
    rows = rows.double()
    values, directions = leading_directions(rows.T @ (rows * weight.double()[:, None]), rank)
    return directions.T[balanced(values, subvectors)]


def balanced(values: Tensor, groups: int) -> Tensor:
    """Group (R,) variances, largest first: (R,) indices, group after group, each R / ``groups`` long.

    Every value goes to the group with the smallest product so far among those that are not full.
    """
    size = len(values) // groups
    # Divided by the smallest, no factor is below 1, so a product never shrinks when its group gets another value.
    positive = values.clamp_min(values[0] * FLOOR).clamp_min(torch.finfo(values.dtype).tiny)
    logarithms = (positive / positive[-1]).log().tolist()
    members: list[list[int]] = [[] for _ in range(groups)]
    for index in range(size * groups):
        products = [sum(logarithms[at] for at in group) if len(group) < size else math.inf for group in members]
        members[products.index(min(products))].append(index)
    return torch.tensor([index for group in members for index in group], device=values.device)
