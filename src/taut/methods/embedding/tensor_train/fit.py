"""Fit a tensor train to a trained table: factors, row order, decomposition, and weighted least squares."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor

from taut.methods.embedding.tensor_train.kernel import TrainShape, expand
from taut.ops.factors.svd import leading_directions

POWER_STEPS = 12
"""Power iterations for the first principal direction of a block. Few suffice: only the order along it is used."""
CONJUGATE_STEPS = 15
"""Conjugate-gradient steps towards the least squares of one core, starting from the present core."""
ROUNDING = 32
"""A residual below this many units in the last place of the right-hand side counts as rounding error."""


@lru_cache
def row_factors(count: int, order: int) -> tuple[int, ...]:
    """Choose K = ``order`` ascending factors of a number P >= ``count`` V.

    They maximise the entropy of the factors' shares of their sum, minus (P - V) / V. Equal factors make the smallest
    cores, and the P - V unused rows are waste.
    """
    root = count ** (1 / order)
    near = range(max(1, math.floor(root / 1.5)), math.ceil(root * 1.5) + 1)
    choices = ((*head, -(-count // math.prod(head))) for head in product(near, repeat=order - 1) if _ascends(head))
    return max((c for c in choices if _ascends(c)), key=lambda c: _entropy(c) - (math.prod(c) - count) / count)


@lru_cache
def column_factors(width: int, order: int) -> tuple[int, ...]:
    """Choose K = ``order`` ascending factors of ``width`` D: those with the highest entropy of their shares."""
    divisors = [number for number in range(1, width + 1) if width % number == 0]
    heads = (head for head in product(divisors, repeat=order - 1) if width % math.prod(head) == 0)
    choices = ((*head, width // math.prod(head)) for head in heads)
    return max((choice for choice in choices if _ascends(choice)), key=_entropy)


def clipped(rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """Reduce ``ranks`` to the greatest useful ones: r_k <= r_{k-1} p_k q_k and r_{k-1} <= r_k p_k q_k.

    The outer ranks are r_0 = r_K = 1.
    """
    modes = [p * q for p, q in zip(rows, columns, strict=True)]
    bonds = [1, *ranks, 1]
    for step, mode in enumerate(modes[:-1]):
        bonds[step + 1] = min(bonds[step + 1], bonds[step] * mode)
    for step in range(len(modes) - 1, 0, -1):
        bonds[step] = min(bonds[step], bonds[step + 1] * modes[step])
    return tuple(bonds[1:-1])


def _ascends(factors: Sequence[int]) -> bool:
    return all(a <= b for a, b in pairwise(factors))


def _entropy(factors: Sequence[int]) -> float:
    total = sum(factors)
    return -sum(factor / total * math.log(factor / total) for factor in factors)


def principal_order(table: Tensor, rows: Sequence[int], first: Tensor) -> Tensor:
    """Order the rows of ``table`` (V, D) so that rows with equal digits are similar: (V,) int64.

    All rows are sorted along their first principal direction and cut into p_1 blocks. Each block is sorted along its
    own first direction and cut into p_2 blocks, and so on. The rows ``first`` (C,) come before all others in the given
    order and do not affect the directions.
    """
    (count, width), capacity, device = table.shape, math.prod(rows), table.device
    others = torch.ones(count, dtype=torch.bool, device=device).index_fill_(0, first, False).nonzero().squeeze(1)
    order = torch.cat((first, others, torch.full((capacity - count,), count, device=device)))
    padded = torch.cat((table[order[:count]], table.new_zeros(capacity - count, width)))
    ends = table.new_zeros(capacity)
    ends[: len(first)], ends[count:] = -math.inf, math.inf
    blocks = 1
    for factor in rows:
        along = _along_first_direction(padded.view(blocks, -1, width), ends.view(blocks, -1) == 0).flatten() + ends
        inner = along.view(blocks, -1).argsort(dim=1, stable=True)
        sorting = (inner + torch.arange(blocks, device=device)[:, None] * inner.shape[1]).flatten()
        order, padded, ends = order[sorting], padded[sorting], ends[sorting]
        blocks *= factor
        if blocks == capacity:
            break
    return order[:count]


def _along_first_direction(blocks: Tensor, taken: Tensor) -> Tensor:
    """Coordinates along each block's first principal direction: (n, rows, D) -> (n, rows).

    Only the rows marked in ``taken`` (n, rows) determine the direction.
    """
    share = taken / taken.sum(1, keepdim=True).clamp_min(1)
    centred = (blocks - share[:, None] @ blocks) * taken[..., None]
    direction = centred.gather(1, centred.norm(dim=2).argmax(1)[:, None, None].expand(-1, 1, blocks.shape[2])).mT
    for _ in range(POWER_STEPS):
        direction = torch.nn.functional.normalize(centred.mT @ (centred @ direction), dim=1)
    peaks = direction.gather(1, direction.abs().argmax(1, keepdim=True))
    return (centred @ (direction * torch.where(peaks < 0, -1.0, 1.0))).squeeze(2)


def decompose(
    table: Tensor, rows: Sequence[int], columns: Sequence[int], choose: Callable[[int, Tensor], int]
) -> list[Tensor]:
    """TT-SVD of ``table`` (P, D); returns the cores in float64.

    ``choose(k, energies)`` returns r_k for the squared singular values of the k-th unfolding, largest first.
    Source: Oseledets 2011, algorithm 1.
    """
    order, cores, rank = len(rows), [], 1
    interleaved = [axis for pair in zip(range(order), range(order, 2 * order), strict=True) for axis in pair]
    carry = table.double().view(*rows, *columns).permute(interleaved)
    for step, (p, q) in enumerate(zip(rows[:-1], columns[:-1], strict=True), start=1):
        matrix = carry.reshape(rank * p * q, -1)
        if matrix.shape[0] <= matrix.shape[1]:
            energies, left = leading_directions(matrix @ matrix.T, len(matrix))
            kept = choose(step, energies)
            left = left[:, :kept]
            carry = left.T @ matrix
        else:
            left, square = torch.linalg.qr(matrix)
            inner, values, right = torch.linalg.svd(square, full_matrices=False)
            kept = choose(step, values.square())
            left = left @ inner[:, :kept]
            carry = values[:kept, None] * right[:kept]
        cores.append(left.reshape(rank, p, q * kept).transpose(0, 1).contiguous())
        rank = kept
    cores.append(carry.reshape(rank, rows[-1], columns[-1]).transpose(0, 1).contiguous())
    return cores


def within(tolerance: float, order: int) -> Callable[[int, Tensor], int]:
    """A ``choose`` for ``decompose``: the least ranks of ``order`` K cores with ||E - TT|| <= ``tolerance`` ||E||.

    The bound follows from the discarded energies. Source: Oseledets 2011, theorem 2.2.
    """
    allowed: list[Tensor] = []

    def choose(step: int, energies: Tensor) -> int:
        if step == 1:
            allowed.append(tolerance**2 / (order - 1) * energies.sum())
        tails = energies.flip(0).cumsum(0).flip(0)
        return max(1, int((tails > allowed[0]).sum()))

    return choose


def separable(weights: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Approximate positive weights of P rows by a product of one weight per digit, its sums over all other digits."""
    grid = weights.double().view(*rows)
    total = grid.sum().clamp_min(torch.finfo(grid.dtype).tiny)
    axes = range(len(rows))
    sums = [grid.sum([axis for axis in axes if axis != digit]) / total * rows[digit] for digit in axes]
    return [weight.clamp_min(weight.max() * 1e-6) for weight in sums]


def decompose_weighted(table: Tensor, shape: TrainShape, weights: Tensor) -> list[Tensor]:
    """TT-SVD of ``table`` (P, D) under the separable part of the row ``weights`` (P,).

    This is exact for that part, because scales of single digits can be divided out of the cores again.
    """
    scales = [weight.sqrt() for weight in separable(weights, shape.rows)]
    grid = table.double() * _outer(scales)[:, None]
    cores = decompose(grid, shape.rows, shape.columns, lambda step, _: shape.ranks[step - 1])
    return [core / scale[:, None, None] for core, scale in zip(cores, scales, strict=True)]


def _outer(scales: Sequence[Tensor]) -> Tensor:
    outer = scales[0]
    for scale in scales[1:]:
        outer = (outer[:, None] * scale).flatten()
    return outer


def refine(cores: list[Tensor], table: Tensor, weights: Tensor, sweeps: int) -> list[Tensor]:
    """Alternating least squares: each core in turn minimises sum_i w_i |E_i - TT_i|^2 with the other cores fixed.

    ``table`` is (P, D), ``weights`` (P,) >= 0. Rows of weight 0 may take any value. Never increases the error beyond
    rounding.
    """
    cores = [core.to(table.dtype) for core in cores]
    weighted = table * weights[:, None]
    for _ in range(sweeps):
        for step in range(len(cores)):
            cores[step] = _solve(cores, step, weighted, weights)
    return cores


def _solve(cores: list[Tensor], step: int, weighted: Tensor, weights: Tensor) -> Tensor:
    """Least squares of one core, all slices i at once.

    Solves sum_{a,c} w_{aic} L_a^T L_a X_i R_c R_c^T = sum_{a,c} w_{aic} L_a^T E_{aic} R_c^T. L_a are the products of
    the cores before this one, R_c those of the cores after it.
    """
    core = cores[step]
    p, rank, width = core.shape
    left, right = _prefix(cores[:step], core), _suffix(cores[step + 1 :], core)
    outer, columns, inner, after = len(left), left.shape[1], len(right), right.shape[1]
    start = core.view(p, rank, -1, after)
    grid = weighted.view(outer, p, inner, columns, start.shape[2], -1)
    target = torch.einsum("apuqs,aur->prqs", torch.einsum("apcuqv,csv->apuqs", grid, right), left)
    before, behind, grid_weights = left.mT @ left, right @ right.mT, weights.view(outer, p, inner)
    # The Gram matrices of one side are summed beforehand, which leaves a sum over the other. Leave the shorter one.
    if inner < outer:
        solved = _conjugate_gradients(
            start.transpose(1, 3), target.transpose(1, 3), behind, before, grid_weights.permute(2, 1, 0)
        )
        return solved.transpose(1, 3).reshape(p, rank, width)
    return _conjugate_gradients(start, target, before, behind, grid_weights).reshape(p, rank, width)


def _conjugate_gradients(x: Tensor, target: Tensor, left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """Take a few steps from ``x`` towards sum_{a,c} w_{aic} A_a X_i C_c = ``target``.

    ``x`` and ``target`` are (p, r, q, s), ``left`` A (a, r, r), ``right`` C (c, s, s), ``weights`` w (a, p, c). Slices
    without any weight do not change.
    """
    p, rank, columns, after = x.shape
    outer = len(left)
    summed = torch.einsum("apc,cst->psat", weights, right).reshape(p, after, -1)
    stacked = left.transpose(0, 1).reshape(rank, -1)

    def normal(y: Tensor) -> Tensor:
        through = y.reshape(p, rank * columns, after) @ summed
        through = through.view(p, rank, columns, outer, after).permute(0, 3, 1, 2, 4).reshape(p, outer * rank, -1)
        return (stacked @ through).view_as(y)

    residual = target - normal(x)
    direction, size = residual, residual.square().sum((1, 2, 3), keepdim=True)
    # A slice whose residual is only rounding error must not change.
    floor = (ROUNDING * torch.finfo(x.dtype).eps) ** 2 * target.square().sum((1, 2, 3), keepdim=True)
    for _ in range(CONJUGATE_STEPS):
        image = normal(direction)
        curvature = (direction * image).sum((1, 2, 3), keepdim=True)
        stride = torch.where((size > floor) & (curvature > 0), size / curvature, 0.0)
        x, residual = x + stride * direction, residual - stride * image
        before, size = size, residual.square().sum((1, 2, 3), keepdim=True)
        direction = residual + torch.where(before > 0, size / before, 0.0) * direction
    return x


def _prefix(cores: Sequence[Tensor], like: Tensor) -> Tensor:
    """Products of the cores before ``like``: (P_<, Q_<, r)."""
    if not cores:
        return like.new_ones(1, 1, 1)
    products = expand(cores)
    return products.view(len(products), -1, like.shape[1])


def _suffix(cores: Sequence[Tensor], like: Tensor) -> Tensor:
    """Products of the cores after ``like``: (P_>, r', Q_>)."""
    products = like.new_ones(1, 1, 1)
    for core in reversed(cores):
        slices = core.view(*core.shape[:2], -1, products.shape[1])
        products = torch.einsum("prqs,csv->pcrqv", slices, products).flatten(3).flatten(0, 1)
    return products
