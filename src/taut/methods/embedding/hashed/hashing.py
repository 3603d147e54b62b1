"""Hash functions of token ids that are the same on every machine, and the fit of a table of shared buckets.

A row of the table is E(v) = sum_i w[v, i] T[h_i(v)] with k hash functions h_i into B buckets. As a matrix product,
E = S T. S (V, B) is sparse with k numbers in each row, and their places need not be stored.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The odd constants of splitmix64 (Steele, Lea and Flood 2014), as signed numbers."""
RIDGE = 1e-10
"""Added to the diagonal of the k x k systems, as a share of its mean, because two hash functions may share a bucket."""


def mix(numbers: Tensor) -> Tensor:
    """One step of splitmix64 modulo 2^64, a bijection: int64 -> int64 of the same shape."""
    numbers = numbers + GOLDEN
    numbers = (numbers ^ _shifted(numbers, 30)) * FIRST
    numbers = (numbers ^ _shifted(numbers, 27)) * SECOND
    return numbers ^ _shifted(numbers, 31)


def hashed(ids: Tensor, hashes: int, buckets: int) -> Tensor:
    """The buckets of tokens: (...) ids -> (..., k) int64 below ``buckets`` B < 2^31, one for each of ``hashes`` k.

    The same on every device and in every process. Multiplying the upper 32 bits by B makes all buckets equally likely
    up to B / 2^32, without a division.
    """
    functions = torch.arange(hashes, device=ids.device) << 32
    return _shifted(_shifted(mix(ids.long()[..., None] + functions), 32) * buckets, 32)


def _shifted(numbers: Tensor, by: int) -> Tensor:
    """Shift right and fill with zeros. torch's own shift repeats the sign bit."""
    return numbers >> by & (1 << 64 - by) - 1


def combine(buckets: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The product S T: (B, D), (V, k) integers and (V, k) -> (V, D)."""
    return F.embedding_bag(index, buckets, mode="sum", per_sample_weights=weights)


def best_weights(table: Tensor, buckets: Tensor, index: Tensor) -> Tensor:
    """(V, k) least-squares coefficients of each row of ``table`` (V, D) for the row's buckets ``index`` (V, k)."""
    pieces = []
    for rows, places in zip(table.split(4096), index.split(4096), strict=True):
        vectors, rows = buckets[places].double(), rows.double()
        gram = vectors @ vectors.transpose(1, 2)
        ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(gram.dtype).tiny)
        gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        pieces.append(torch.linalg.solve(gram, vectors @ rows[..., None]).squeeze(-1))
    return torch.cat(pieces).to(table)


def fit_buckets(
    table: Tensor, index: Tensor, count: int, importance: Tensor | None, rounds: int, steps: int, seed: int
) -> tuple[Tensor, Tensor, list[float]]:
    """Fit buckets (B, D) and weights (V, k) to ``table`` (V, D); also returns the error after each round.

    The error is the sum over rows of ``importance`` (V,), or one, times the squared distance; it never rises. Each
    round first improves the buckets by ``steps`` of conjugate gradients on their sparse normal equations, then
    computes the best weights of every row. Weights start as random signs, so that rows in one bucket may differ.
    """
    order = index.flatten().argsort(stable=True)
    tokens, starts = order // index.shape[1], _starts(index, count)
    importance = table.new_ones(len(table)) if importance is None else importance.to(table)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 2, index.shape, generator=generator).to(table) * 2 - 1
    buckets, errors = table.new_zeros(count, table.shape[1]), []
    for _ in range(rounds):
        # S^T F, with F the diagonal of importances, as sums over the tokens of each bucket.
        shares = (weights * importance[:, None]).flatten()[order]

        def collect(rows: Tensor, shares: Tensor = shares) -> Tensor:
            return F.embedding_bag(tokens, rows, starts, mode="sum", per_sample_weights=shares)

        buckets = _conjugate_gradients(
            lambda point, weights=weights, collect=collect: collect(combine(point, index, weights)),
            collect(table - combine(buckets, index, weights)),
            buckets,
            steps,
        )
        weights = best_weights(table, buckets, index)
        errors.append(float(importance @ (table - combine(buckets, index, weights)).square().sum(1)))
    return buckets, weights, errors


def _starts(index: Tensor, count: int) -> Tensor:
    """(B,) positions at which each bucket's tokens begin when all are sorted by bucket."""
    sizes = torch.bincount(index.flatten(), minlength=count)
    return sizes.cumsum(0) - sizes


def _conjugate_gradients(product: Callable[[Tensor], Tensor], residual: Tensor, solution: Tensor, steps: int) -> Tensor:
    """Improve ``solution`` (B, D) of a positive semi-definite system, each column separately."""
    direction, power = residual, residual.square().sum(0)
    for _ in range(steps):
        image = product(direction)
        length = power / (direction * image).sum(0).clamp_min(torch.finfo(power.dtype).tiny)
        solution, residual = solution + length * direction, residual - length * image
        power, before = residual.square().sum(0), power
        direction = residual + direction * (power / before.clamp_min(torch.finfo(power.dtype).tiny))
    return solution
