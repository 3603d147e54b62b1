"""Truncated singular value decompositions in float64, with fixed signs: the same matrix gives the same bits."""

import torch
from torch import Tensor

DAMPING = 1e-4
"""Share of the mean input energy added to every direction, including those without inputs in the calibration text."""


def leading_directions(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` largest eigenvalues (R,) of a symmetric positive semi-definite (N, N), and their eigenvectors as
    the columns of (N, R), float64, largest first. In each column the entry of largest magnitude is positive."""
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values[-rank:].flip(0).clamp_min(0), vectors[:, -rank:].flip(1)
    peaks = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values, vectors * torch.where(peaks < 0, -1.0, 1.0)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of ``rank`` R to (M, N): P (M, R), S (R,), Q^T (R, N) in float64, P diag(S) Q^T.

    Uses the Gram matrix of the shorter side, which costs O(M N min(M, N)) for any rank. It resolves singular values
    down to 1e-8 of the largest, below the rounding of float32 weights. Directions under that floor are returned as
    zeros. Source: Eckart and Young, 1936.
    """
    matrix = matrix.double()
    if matrix.shape[0] < matrix.shape[1]:
        right, values, left = truncated_svd(matrix.T, rank)
        return left.T, values, right.T
    values, vectors = leading_directions(matrix.T @ matrix, rank)
    floor = values[0] * matrix.shape[1] * torch.finfo(torch.float64).eps
    values = torch.where(values > floor, values, 0.0).sqrt()
    left = (matrix @ vectors) * torch.where(values > 0, 1 / values, 0.0)
    return left, values, vectors.T * (values > 0)[:, None]


def balanced_factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (M, R) = P sqrt(S) and V (R, N) = sqrt(S) Q^T, so that U V is the best rank-R approximation of (M, N) and
    U^T U = V V^T = S. Source: Wei et al. 2024 (arXiv 2406.16450) and their code."""
    left, values, right = truncated_svd(matrix, rank)
    return left * values.sqrt(), values.sqrt()[:, None] * right


def balanced_factors_for(matrix: Tensor, gram: Tensor, rank: int, damping: float) -> tuple[Tensor, Tensor]:
    """U (M, R) and V (R, N), balanced, that minimise E ||(W - U V) x||^2 for inputs x with E[x x^T] = ``gram`` (N, N).

    The minimum is W projected onto the R leading left singular vectors of W G^(1/2). ``damping`` adds that share of
    the mean diagonal to G. It determines the directions without inputs in the calibration text. The error on the
    calibration text stays at most that of the plain decomposition.
    Source: Wang et al. 2024 (SVD-LLM, arXiv 2403.07378), section 3.1, without its Cholesky factor: G may be singular.
    """
    matrix, gram = matrix.double(), damped(gram.to(matrix.device), damping)
    if matrix.shape[0] <= matrix.shape[1]:
        _, left = leading_directions(matrix @ gram @ matrix.T, rank)
    else:
        values, vectors = torch.linalg.eigh(gram)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        left, _, _ = truncated_svd(matrix @ root, rank)
    outer, inner = balanced_factors(left.T @ matrix, rank)
    return left @ outer, inner


def damped(gram: Tensor, damping: float) -> Tensor:
    """``gram`` (N, N) in float64 with ``damping`` times its mean diagonal added to the diagonal, so that it can be
    inverted. If the mean is zero (all inputs are zero), 1 is used in its place."""
    gram = gram.double()
    mean = gram.diagonal().mean()
    unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return gram + damping * torch.where(mean > 0, mean, 1.0) * unit
