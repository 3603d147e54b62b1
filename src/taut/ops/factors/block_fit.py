"""A linear map whose columns come in B blocks, each block of low rank: the nearest one to a trained map.

W (M, N) ~ [U_1 V_1, ..., U_B V_B], with U_b (M, R_b) and V_b (R_b, N / B). That is BlockDense, and it is what every
share of BlockShuffle's outputs sees.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.factors.svd import balanced_factors, balanced_factors_for, damped

SWEEPS = 12
"""The most; on trained maps what is left to gain by then is about a hundredth of the error."""
GAIN = 1e-3
"""Stop when a sweep lowers the error by a smaller share than this."""

Factors = list[tuple[Tensor, Tensor]]


def block_factors(matrix: Tensor, ranks: Sequence[int]) -> Factors:
    """U_b and V_b, balanced, float64, so that the sum of squared errors of the (M, N) weight is least: one truncated
    singular value decomposition a block. ``ranks`` R_b has an entry for each block."""
    return [balanced_factors(part, rank) for part, rank in zip(matrix.chunk(len(ranks), 1), ranks, strict=True)]


def block_factors_for(matrix: Tensor, gram: Tensor, ranks: Sequence[int], damping: float) -> Factors:
    """U_b and V_b, balanced, float64, for a small E ||(W - [U_1 V_1, ...]) x||^2 over inputs with E[x x^T] = ``gram``.

    Correlated inputs let one block make up for what another lost, so the blocks take turns: with the others as they
    are, the best map of rank R_b on the inputs of block b is the least-squares one, W_b + (W - W') G_b G_bb^-1,
    truncated in the metric G_bb. After each round all U_b are solved for at once. No step raises the error, and the
    start is ``block_factors``: so the error on the calibration text ends at most where the plain fit's is.
    ``damping`` is as in ``balanced_factors_for``, or more where that is not enough (``definite``).
    Source: reduced-rank regression (Izenman 1975), block by block.
    """
    matrix, gram = matrix.double(), definite(gram.to(matrix.device), damping)
    width = matrix.shape[1] // len(ranks)
    bounds = [slice(start, stop) for start, stop in pairwise(range(0, matrix.shape[1] + 1, width))]
    metrics = [gram[columns, columns] for columns in bounds]
    # G_b G_bb^-1: how an error on any input is best made up for on the inputs of block b.
    transfers = [
        torch.cholesky_solve(gram[columns], torch.linalg.cholesky(metric)).T
        for columns, metric in zip(bounds, metrics, strict=True)
    ]
    now = torch.cat([outer @ inner for outer, inner in block_factors(matrix, ranks)], dim=1)
    error = _error(matrix - now, gram)
    for _ in range(SWEEPS):
        best = []
        for columns, metric, transfer, rank in zip(bounds, metrics, transfers, ranks, strict=True):
            wish = now[:, columns] + (matrix - now) @ transfer
            outer, inner = balanced_factors_for(wish, metric, rank, damping=0.0)
            now[:, columns] = outer @ inner
            best.append(inner)
        now = _with_inner(matrix, gram, torch.block_diag(*best))
        last, error = error, _error(matrix - now, gram)
        if error >= (1 - GAIN) * last:
            break
    return block_factors(now, ranks)


def shuffled_factors(matrix: Tensor, blocks: int, gram: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
    """b1 (B, N/B, K/B) and b2 (B, K/B, M/B), both transposed, float64, of the BlockShuffle nearest to ``matrix``
    (M, N), with K = min(M, N); nearest on the inputs of ``gram`` where that is given.

    Hidden number t comes from run t div (K/B) of the inputs and goes to the outputs l, l + B, ... with l = t mod B. So
    those outputs see each run through some numbers of their own: the rows of W at l, l + B, ... are a map in blocks of
    low rank, and no two l share anything. Source: Dao et al. 2022 (Monarch, arXiv 2204.00595), section 3.3, for the
    projection of a weight.
    """
    (outputs, inputs), hidden = matrix.shape, min(matrix.shape)
    run = hidden // blocks
    inner = matrix.new_empty(hidden, inputs // blocks, dtype=torch.float64)
    outer = matrix.new_empty(blocks, run, outputs // blocks, dtype=torch.float64)
    for share in range(blocks):
        ranks = torch.bincount(torch.arange(share, hidden, blocks) // run, minlength=blocks).tolist()
        rows = matrix[share::blocks]
        factors = block_factors(rows, ranks) if gram is None else block_factors_for(rows, gram, ranks, damping)
        inner[share::blocks] = torch.cat([one for _, one in factors])
        outer[share] = torch.cat([one for one, _ in factors], dim=1).T
    return inner.unflatten(0, (blocks, run)).transpose(1, 2), outer


def definite(gram: Tensor, damping: float) -> Tensor:
    """``damped``, with ten times as much, and again, until the matrix is positive definite: rounding can leave sums of
    products indefinite by more than a small damping. Raises TautError for numbers that are not finite."""
    if not gram.isfinite().all():
        raise TautError("calibration saw inputs that are not finite, so there is nothing to weigh errors by")
    while torch.linalg.cholesky_ex(damped(gram, damping)).info:
        damping *= 10
    return damped(gram, damping)


def _with_inner(matrix: Tensor, gram: Tensor, inner: Tensor) -> Tensor:
    """The best U V for this V (R, N). A direction that V leaves empty is no obstacle."""
    seen = inner @ gram
    return matrix @ seen.T @ torch.linalg.pinv(seen @ inner.T, hermitian=True) @ inner


def _error(gap: Tensor, gram: Tensor) -> float:
    return ((gap @ gram) * gap).sum().item()
