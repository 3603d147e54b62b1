"""Weighted k-means for many problems in parallel, such as one for each subvector of a table."""

import torch
from torch import Tensor

SCORES_AT_ONCE = 1 << 20
"""Distances held at a time, so that they stay in the cache between product and minimum."""
ITERATIONS = 20
TOLERANCE = 1e-3
"""Stop when an iteration lowers the objective by less than this share of it."""


def nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point, the first of equal ones, and the squared distance to it.

    (P, N, w) and (P, C, w), P independent problems -> (P, N) int64 and (P, N). Extra memory O(result).
    """
    problems, count, _ = points.shape
    half, flipped = centroids.square().sum(2)[:, None] / 2, centroids.transpose(1, 2)
    step = max(1, SCORES_AT_ONCE // (problems * centroids.shape[1]))
    codes = torch.empty(problems, count, dtype=torch.long, device=points.device)
    distances = points.square().sum(2)
    for start in range(0, count, step):
        piece = slice(start, start + step)
        # Half the squared distance, without the part that is the same for all centroids.
        least, codes[:, piece] = torch.baddbmm(half, points[:, piece], flipped, alpha=-1).min(2)
        distances[:, piece] += 2 * least
    return codes, distances.clamp_(min=0)


def means(points: Tensor, codes: Tensor, weight: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of the points of each code, and their weight: (P, N, w), (P, N), (N,) -> (P, C, w), (P, C).

    A code without weight keeps its row of ``centroids`` (P, C, w).
    """
    problems, count, width = points.shape
    size = centroids.shape[1]
    places = (codes + torch.arange(problems, device=codes.device)[:, None] * size).reshape(-1)
    weighted = (points * weight[:, None]).reshape(-1, width)
    sums = points.new_zeros(problems * size, width).index_add_(0, places, weighted).view_as(centroids)
    total = points.new_zeros(problems * size).index_add_(0, places, weight.expand(problems, count).reshape(-1))
    total = total.view(problems, size)
    divisor = torch.where(total > 0, total, 1.0)[..., None]
    return torch.where(total[..., None] > 0, sums / divisor, centroids), total


def kmeans(
    points: Tensor, weight: Tensor, start: Tensor, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor, list[float]]:
    """Centroids (P, C, w) and codes (P, N) int64 that lower sum_n weight_n |x_n - c|^2, and the sum at each iteration.

    ``points`` (P, N, w), ``weight`` (N,) >= 0 the same for all problems, ``start`` (P, C, w). A centroid without points
    moves to one of the points with the largest weighted distance. So a problem with at most C different points ends
    exact, given enough iterations. The sums never rise. Source: Lloyd 1982.
    """
    centroids, sums = start, []
    codes, distances = nearest(points, centroids)
    for _ in range(iterations):
        sums.append(float((distances @ weight).sum()))
        centroids, total = means(points, codes, weight, centroids)
        unused = total == 0
        for problem in unused.any(1).nonzero().view(-1).tolist():
            lost = unused[problem].nonzero().view(-1)[: points.shape[1]]
            worst = (distances[problem] * weight).topk(len(lost)).indices
            centroids[problem, lost] = points[problem, worst]
        codes, distances = nearest(points, centroids)
        now = float((distances @ weight).sum())
        if not bool(unused.any()) and now > (1 - TOLERANCE) * sums[-1]:
            break
    return centroids, codes, [*sums, float((distances @ weight).sum())]
