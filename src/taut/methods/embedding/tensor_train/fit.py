"""Fitting a tensor train to a trained table: factors, row order, decomposition, and weighted least squares."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise, product

import torch
from torch import Tensor

from taut.methods.embedding.tensor_train.kernel import TrainShape, expand
from taut.ops.factors.svd import leading_directions

POWER_STEPS = 12
"""Multiplications that find the first principal direction of a block of rows: only their order along it counts."""
CONJUGATE_STEPS = 15
"""Steps towards one core's least squares, from the core as it is."""
ROUNDING = 32
"""Units in the last place of the right-hand side, below which a residual says nothing."""


@lru_cache
def row_factors(count: int, order: int) -> tuple[int, ...]:
    """K = ``order`` factors, ascending, of a number P >= ``count`` V: the highest entropy of their shares of the sum,
    less the share of P - V in V. Equal factors make the smallest cores; unused numbers waste their rows."""
    root = count ** (1 / order)
    near = range(max(1, math.floor(root / 1.5)), math.ceil(root * 1.5) + 1)
    choices = ((*head, -(-count // math.prod(head))) for head in product(near, repeat=order - 1) if _ascends(head))
    return max((c for c in choices if _ascends(c)), key=lambda c: _entropy(c) - (math.prod(c) - count) / count)


@lru_cache
def column_factors(width: int, order: int) -> tuple[int, ...]:
    """K = ``order`` factors, ascending, whose product is ``width`` D exactly: the highest entropy."""
    divisors = [number for number in range(1, width + 1) if width % number == 0]
    heads = (head for head in product(divisors, repeat=order - 1) if width % math.prod(head) == 0)
    choices = ((*head, width // math.prod(head)) for head in heads)
    return max((choice for choice in choices if _ascends(choice)), key=_entropy)


def clipped(rows: Sequence[int], columns: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...]:
    """``ranks`` no greater than what they can use: r_k <= r_{k-1} p_k q_k and r_{k-1} <= r_k p_k q_k, with
    r_0 = r_K = 1."""
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
    """The rows of ``table`` (V, D) so ordered that equal digits mean alike rows: (V,) int64.

    All are sorted along their first principal direction and cut into p_1 blocks, each is sorted along its own and cut
    into p_2, and so on. ``first`` (C,) rows come before all others, in their order, and take no part.
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
        new = (inner + torch.arange(blocks, device=device)[:, None] * inner.shape[1]).flatten()
        order, padded, ends = order[new], padded[new], ends[new]
        blocks *= factor
        if blocks == capacity:
            break
    return order[:count]


def _along_first_direction(blocks: Tensor, taken: Tensor) -> Tensor:
    """(n, rows, D) -> (n, rows): where each row lies along its block's first principal direction, among ``taken``."""
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
    """TT-SVD of (P, D): the cores, float64. ``choose(k, energies)`` gives r_k from the squared singular values of the
    k-th unfolding, largest first. Source: Oseledets 2011, algorithm 1."""
    order, cores, rank = len(rows), [], 1
    interleaved = [axis for pair in zip(range(order), range(order, 2 * order), strict=True) for axis in pair]
    carry = table.double().view(*rows, *columns).permute(interleaved)
    for step, (p, q) in enumerate(zip(rows[:-1], columns[:-1], strict=True), start=1):
        matrix = carry.reshape(rank * p * q, -1)
        if matrix.shape[0] <= matrix.shape[1]:
            energies, left = leading_directions(matrix @ matrix.T, len(matrix))
            found = choose(step, energies)
            left = left[:, :found]
            carry = left.T @ matrix
        else:
            left, square = torch.linalg.qr(matrix)
            inner, values, right = torch.linalg.svd(square, full_matrices=False)
            found = choose(step, values.square())
            left = left @ inner[:, :found]
            carry = values[:found, None] * right[:found]
        cores.append(left.reshape(rank, p, q * found).transpose(0, 1).contiguous())
        rank = found
    cores.append(carry.reshape(rank, rows[-1], columns[-1]).transpose(0, 1).contiguous())
    return cores


def within(tolerance: float, order: int) -> Callable[[int, Tensor], int]:
    """For ``decompose``: the least ranks whose discarded energies keep ||E - TT|| <= ``tolerance`` ||E||, of ``order``
    K cores. Source: Oseledets 2011, theorem 2.2."""
    allowed: list[Tensor] = []

    def choose(step: int, energies: Tensor) -> int:
        if step == 1:
            allowed.append(tolerance**2 / (order - 1) * energies.sum())
        tails = energies.flip(0).cumsum(0).flip(0)
        return max(1, int((tails > allowed[0]).sum()))

    return choose


def separable(weights: Tensor, rows: Sequence[int]) -> list[Tensor]:
    """Positive weights of P rows as a product of one weight for each digit, from their sums over all other digits."""
    grid = weights.double().view(*rows)
    total = grid.sum().clamp_min(torch.finfo(grid.dtype).tiny)
    axes = range(len(rows))
    sums = [grid.sum([axis for axis in axes if axis != own]) / total * rows[own] for own in axes]
    return [one.clamp_min(one.max() * 1e-6) for one in sums]


def decompose_weighted(table: Tensor, shape: TrainShape, weights: Tensor) -> list[Tensor]:
    """TT-SVD of (P, D) for the separable part of the rows' ``weights`` (P,): exact, since scales that belong to single
    digits can be taken back from the cores."""
    scales = [one.sqrt() for one in separable(weights, shape.rows)]
    grid = table.double() * _outer(scales)[:, None]
    cores = decompose(grid, shape.rows, shape.columns, lambda step, _: shape.ranks[step - 1])
    return [core / scale[:, None, None] for core, scale in zip(cores, scales, strict=True)]


def _outer(scales: Sequence[Tensor]) -> Tensor:
    found = scales[0]
    for scale in scales[1:]:
        found = (found[:, None] * scale).flatten()
    return found


def refine(cores: list[Tensor], table: Tensor, weights: Tensor, sweeps: int) -> list[Tensor]:
    """Alternating least squares: each core in turn minimises sum_i w_i |E_i - TT_i|^2 with the others as they are.

    ``table`` (P, D), ``weights`` (P,) >= 0; rows of weight 0 are free. Never increases the error beyond rounding.
    """
    cores = [core.to(table.dtype) for core in cores]
    weighted = table * weights[:, None]
    for _ in range(sweeps):
        for step in range(len(cores)):
            cores[step] = _solve(cores, step, weighted, weights)
    return cores


def _solve(cores: list[Tensor], step: int, weighted: Tensor, weights: Tensor) -> Tensor:
    """The core's least squares, all slices i at once: sum_{a,c} w_{aic} L_a^T L_a X_i R_c R_c^T = sum_{a,c} w_{aic}
    L_a^T E_{aic} R_c^T, with L_a the products of the cores before and R_c of those behind."""
    core = cores[step]
    p, rank, width = core.shape
    left, right = _prefix(cores[:step], core), _suffix(cores[step + 1 :], core)
    outer, columns, inner, after = len(left), left.shape[1], len(right), right.shape[1]
    start = core.view(p, rank, -1, after)
    grid = weighted.view(outer, p, inner, columns, start.shape[2], -1)
    target = torch.einsum("apuqs,aur->prqs", torch.einsum("apcuqv,csv->apuqs", grid, right), left)
    grams, behind, own = left.mT @ left, right @ right.mT, weights.view(outer, p, inner)
    # Summing one side's Grams beforehand leaves a sum over the other: let that be the short one.
    if inner < outer:
        found = _conjugate_gradients(start.transpose(1, 3), target.transpose(1, 3), behind, grams, own.permute(2, 1, 0))
        return found.transpose(1, 3).reshape(p, rank, width)
    return _conjugate_gradients(start, target, grams, behind, own).reshape(p, rank, width)


def _conjugate_gradients(x: Tensor, target: Tensor, left: Tensor, right: Tensor, weights: Tensor) -> Tensor:
    """A few steps from ``x`` towards sum_{a,c} w_{aic} A_a X_i C_c = ``target``: x and target (p, r, q, s), A
    (a, r, r), C (c, s, s), w (a, p, c). Slices without any weight stay as they are."""
    p, rank, own, after = x.shape
    outer = len(left)
    summed = torch.einsum("apc,cst->psat", weights, right).reshape(p, after, -1)
    stacked = left.transpose(0, 1).reshape(rank, -1)

    def normal(y: Tensor) -> Tensor:
        through = y.reshape(p, rank * own, after) @ summed
        through = through.view(p, rank, own, outer, after).permute(0, 3, 1, 2, 4).reshape(p, outer * rank, -1)
        return (stacked @ through).view_as(y)

    residual = target - normal(x)
    direction, size = residual, residual.square().sum((1, 2, 3), keepdim=True)
    # What rounding makes of a slice that is already right must not be followed.
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
    """Products of the cores before: (P_<, Q_<, r)."""
    if not cores:
        return like.new_ones(1, 1, 1)
    found = expand(cores)
    return found.view(len(found), -1, like.shape[1])


def _suffix(cores: Sequence[Tensor], like: Tensor) -> Tensor:
    """Products of the cores behind: (P_>, r', Q_>)."""
    found = like.new_ones(1, 1, 1)
    for core in reversed(cores):
        slices = core.view(*core.shape[:2], -1, found.shape[1])
        found = torch.einsum("prqs,csv->pcrqv", slices, found).flatten(3).flatten(0, 1)
    return found
