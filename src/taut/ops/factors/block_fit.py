"""Fit a linear map whose columns form B blocks of low rank: the map of this kind nearest to a trained one.

W (M, N) ~ [U_1 V_1, ..., U_B V_B], with U_b (M, R_b) and V_b (R_b, N / B). BlockDense is this map. In BlockShuffle,
each share of the outputs is computed by such a map.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.factors.svd import balanced_factors, balanced_factors_for, damped

SWEEPS = 12
"""The maximum number of sweeps. On trained maps, the gain left after these is about a hundredth of the error."""
GAIN = 1e-3
"""Stop when a sweep lowers the error by a smaller share than this."""

Factors = list[tuple[Tensor, Tensor]]


def block_factors(matrix: Tensor, ranks: Sequence[int]) -> Factors:
    """U_b and V_b, balanced, float64, with the least sum of squared errors of the (M, N) weight: one truncated singular
    value decomposition per block. ``ranks`` R_b has an entry for each block."""
    return [balanced_factors(part, rank) for part, rank in zip(matrix.chunk(len(ranks), 1), ranks, strict=True)]


def block_factors_for(matrix: Tensor, gram: Tensor, ranks: Sequence[int], damping: float) -> Factors:
    """U_b and V_b, balanced, float64, with a small E ||(W - [U_1 V_1, ...]) x||^2 over inputs with E[x x^T] = ``gram``.

    With correlated inputs, one block can compensate for the error of another, so the blocks are fitted in turn. With
    the other blocks fixed, the best map of rank R_b on the inputs of block b is the least-squares one,
    W_b + (W - W') G_b G_bb^-1, truncated in the metric G_bb. After each round all U_b are solved for at once. The start
    is ``block_factors``, and no step raises the error. So the error on the calibration text is at most that of the
    plain fit. ``damping`` is as in ``balanced_factors_for``, or more if that is not enough (``definite``).
    Source: reduced-rank regression (Izenman 1975), block by block.
    """
    matrix, gram = matrix.double(), definite(gram.to(matrix.device), damping)
    width = matrix.shape[1] // len(ranks)
    bounds = [slice(start, stop) for start, stop in pairwise(range(0, matrix.shape[1] + 1, width))]
    metrics = [gram[columns, columns] for columns in bounds]
    # G_b G_bb^-1: how the inputs of block b best compensate for an error on any input.
    transfers = [
        torch.cholesky_solve(gram[columns], torch.linalg.cholesky(metric)).T
        for columns, metric in zip(bounds, metrics, strict=True)
    ]
    now = torch.cat([outer @ inner for outer, inner in block_factors(matrix, ranks)], dim=1)
    error = _error(matrix - now, gram)
    for _ in range(SWEEPS):
        best = []
        for columns, metric, transfer, rank in zip(bounds, metrics, transfers, ranks, strict=True):
            target = now[:, columns] + (matrix - now) @ transfer
            outer, inner = balanced_factors_for(target, metric, rank, damping=0.0)
            now[:, columns] = outer @ inner
            best.append(inner)
        now = _with_inner(matrix, gram, torch.block_diag(*best))
        last, error = error, _error(matrix - now, gram)
        if error >= (1 - GAIN) * last:
            break
    return block_factors(now, ranks)


def shuffled_factors(matrix: Tensor, blocks: int, gram: Tensor | None, damping: float) -> tuple[Tensor, Tensor]:
    """b1 (B, N/B, K/B) and b2 (B, K/B, M/B), both transposed, float64, of the BlockShuffle nearest to ``matrix``
    (M, N), with K = min(M, N). If ``gram`` is given, nearest on the inputs with this Gram matrix.

    Hidden number t comes from run t div (K/B) of the inputs and goes to the outputs l, l + B, ... with l = t mod B. So
    the outputs of one l see each run through hidden numbers that no other l uses. The rows of W at l, l + B, ... are
    therefore a map in blocks of low rank, and each l can be fitted alone.
    Source: Dao et al. 2022 (Monarch, arXiv 2204.00595), section 3.3, for the projection of a weight.
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
    """``damped``, with ``damping`` raised tenfold until the matrix is positive definite. Rounding can make sums of
    products indefinite by more than a small damping. Raises TautError for numbers that are not finite."""
    if not gram.isfinite().all():
        raise TautError("calibration saw inputs that are not finite, so they cannot weight the errors")
    while torch.linalg.cholesky_ex(damped(gram, damping)).info:
        damping *= 10
    return damped(gram, damping)


def _with_inner(matrix: Tensor, gram: Tensor, inner: Tensor) -> Tensor:
    """The best U V for this V (R, N). The pseudoinverse allows rows of V that are zero or dependent."""
    seen = inner @ gram
    return matrix @ seen.T @ torch.linalg.pinv(seen @ inner.T, hermitian=True) @ inner


def _error(gap: Tensor, gram: Tensor) -> float:
    return ((gap @ gram) * gap).sum().item()
