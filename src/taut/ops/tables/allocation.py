"""Bits for rows under a budget: the next byte goes to the row that gains most from it."""

import torch
from torch import Tensor


def allocate(loss: Tensor, cost: Tensor, budget: int) -> Tensor:
    """A level for every row, (V,) int64, that makes the summed loss small at a summed cost of at most ``budget``.

    ``loss``: (V, L) float, of every row at every level; ``cost``: (L,) integers, ascending. The budget must pay for
    every row at level 0.

    This is the Lagrangian solution: each row takes the level where loss + multiplier * cost is least, which lies on the
    lower convex hull of its (cost, loss) points. The hull segments of all rows are sorted by loss saved per cost and
    taken from the top. The multiplier is the slope where the budget ends, found without bisection. If the budget ends
    exactly between two segments, no allocation is better. Otherwise the gap is below one segment's saving, and the rest
    pays for single upgrades that still fit. Ties go to lower levels first, then to the earlier row.
    Source: Shoham and Gersho 1988, Efficient bit allocation for an arbitrary set of quantizers.
    """
    loss, cost = loss.double().cpu(), cost.long().cpu()
    slopes, prices = _segments(loss, cost)
    # Ordered by level, so that among equal slopes the lower segment of a row comes first.
    order = slopes.T.reshape(-1).argsort(descending=True, stable=True)
    spent = prices.T.reshape(-1)[order].cumsum(0) + len(loss) * cost[0]
    worth = slopes.T.reshape(-1)[order] > 0
    taken = order[(spent <= budget) & worth]
    levels = torch.zeros(len(loss), dtype=torch.long)
    # A segment that ends at level l + 1 raises its row to that level. The highest segment taken counts.
    levels.scatter_reduce_(0, taken % len(loss), taken // len(loss) + 1, "amax")
    return _fill(levels, loss, cost, budget)


def _segments(loss: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and prices, (V, L - 1), of the hull segment that *ends* at level 1, 2, ...; both zero if no segment
    does. Slopes fall from segment to segment of a row."""
    rows, count = loss.shape
    slopes = torch.zeros(rows, count - 1, dtype=torch.float64)
    prices = torch.zeros(rows, count - 1, dtype=torch.long)
    current = torch.zeros(rows, dtype=torch.long)
    steepest = torch.full((rows,), torch.inf, dtype=torch.float64)
    for _ in range(count - 1):
        # Along the hull: from a row's level to the one with the greatest saving per cost (the farthest of equals).
        price = cost[None, :] - cost[current, None]
        saving = loss.gather(1, current[:, None]) - loss
        rate = torch.where(price > 0, saving / price.clamp_min(1), -torch.inf)
        best = count - 1 - rate.flip(1).argmax(1)
        # Rounding must not let a later segment overtake an earlier one.
        steepest = torch.minimum(steepest, rate.gather(1, best[:, None])[:, 0])
        moving = (steepest > 0).nonzero()[:, 0]
        end = best[moving] - 1
        slopes[moving, end] = steepest[moving]
        prices[moving, end] = price[moving, best[moving]]
        current[moving] = best[moving]
    return slopes, prices


def _fill(levels: Tensor, loss: Tensor, cost: Tensor, budget: int) -> Tensor:
    """Spend what remains, less than one segment's price, on the single upgrades that save most per cost."""
    while True:
        rest = budget - int(cost[levels].sum())
        price = cost[None, :] - cost[levels, None]
        saving = loss.gather(1, levels[:, None]) - loss
        rate = torch.where((price > 0) & (price <= rest), saving / price.clamp_min(1), 0.0)
        best = int(rate.argmax())
        if rate.flatten()[best] <= 0:
            return levels
        levels[best // len(cost)] = best % len(cost)
