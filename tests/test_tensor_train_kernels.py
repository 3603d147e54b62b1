"""Tensor trains as such: products of cores, decompositions and their bounds, in double precision."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from trains import ROWS, WIDTH, fitted, matrix, method, site

from taut.core.errors import TautError
from taut.methods.base import Calibration
from taut.methods.embedding.tensor_train import kernel as kernel
from taut.methods.embedding.tensor_train.bit_packing import bits_below, pack_integers, packed_bytes, read_integers
from taut.methods.embedding.tensor_train.fit import (
    clipped,
    column_factors,
    decompose,
    refine,
    row_factors,
    separable,
    within,
)
from taut.methods.embedding.tensor_train.kernel import TrainShape, expand, prefixes, scores, vectors

CPU = torch.device("cpu")
SHAPE = TrainShape((3, 4, 5), (2, 3, 4), (3, 5))
SMALL = TrainShape((2, 3, 2), (2, 1, 2), (2, 3))
FOUR = TrainShape((2, 1, 2, 3), (1, 2, 2, 2), (2, 3, 2))


def random_cores(shape: TrainShape, trained: bool = False) -> list[Tensor]:
    cores = [matrix(*core, seed=seed) for seed, core in enumerate(shape.cores)]
    return [core.requires_grad_(trained) for core in cores]


def by_definition(cores: list[Tensor], shape: TrainShape) -> Tensor:
    """E[i, j] = G_1[i_1, j_1] ... G_K[i_K, j_K], number by number."""
    table = torch.empty(shape.capacity, math.prod(shape.columns), dtype=torch.float64)
    bonds = (*shape.ranks, 1)
    for row, i in enumerate(itertools.product(*map(range, shape.rows))):
        for column, j in enumerate(itertools.product(*map(range, shape.columns))):
            entry = torch.ones(1, 1, dtype=torch.float64)
            for core, one, other, right in zip(cores, i, j, bonds, strict=True):
                entry = entry @ core[one][:, other * right : (other + 1) * right]
            table[row, column] = entry
    return table


@pytest.mark.parametrize("shape", [SMALL, FOUR, TrainShape((3, 7), (2, 5), (6,))])
def test_rows_are_the_products_of_the_definition(shape):
    cores = random_cores(shape)
    table = by_definition(cores, shape)
    torch.testing.assert_close(expand(cores), table, rtol=1e-12, atol=1e-12)
    positions = torch.arange(shape.capacity)
    for share in (True, False):
        rows = vectors(prefixes(positions, shape.rows, share), cores)
        torch.testing.assert_close(rows, table, rtol=1e-12, atol=1e-12)
    assert shape.numbers == sum(core.numel() for core in cores)


@pytest.mark.parametrize("share", [True, False])
def test_digits_number_every_row_once(share):
    positions = torch.arange(SHAPE.capacity)
    levels = prefixes(positions, SHAPE.rows, share)
    number, reached = torch.zeros_like(levels[0].digits), levels[0].digits
    for level, count in zip(levels[1:], SHAPE.rows[1:], strict=True):
        number = reached if level.parents is None else reached[level.parents]
        reached = number * count + level.digits
    assert torch.equal(reached, positions)
    assert [len(level.digits) for level in levels] == ([3, 12, 60] if share else [60, 60, 60])


@pytest.mark.parametrize("shape", [SMALL, FOUR])
def test_gradients_of_lookup_and_tied_head_are_those_of_finite_differences(shape, monkeypatch):
    cores = random_cores(shape, trained=True)
    positions = torch.tensor([0, 3, 4, 7, shape.capacity - 1])
    for share in (True, False):
        levels = prefixes(positions, shape.rows, share)
        assert torch.autograd.gradcheck(lambda *own, levels=levels: vectors(levels, own), cores)
    hidden, count = matrix(2, math.prod(shape.columns), seed=9).requires_grad_(), shape.capacity - 1
    for ahead in (True, False):
        monkeypatch.setattr(TrainShape, "expands", lambda self, count, tokens, ahead=ahead: ahead)
        assert torch.autograd.gradcheck(lambda h, *own: scores(h, own, shape, count), (hidden, *cores))


def test_lookup_in_small_steps_is_the_same(monkeypatch):
    cores = random_cores(SHAPE, trained=True)
    levels = prefixes(torch.arange(SHAPE.capacity), SHAPE.rows, True)
    whole = vectors(levels, cores)
    weights = matrix(*whole.shape, seed=4)
    expected = torch.autograd.grad((whole * weights).sum(), cores)
    monkeypatch.setattr(kernel, "NUMBERS_AT_ONCE", 500)
    steps = vectors(levels, cores)
    assert torch.equal(steps, whole)
    for mine, other in zip(torch.autograd.grad((steps * weights).sum(), cores), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


def test_both_ways_to_the_tied_head_agree_and_the_cheaper_is_taken(monkeypatch):
    cores = [core.float() for core in random_cores(SHAPE)]
    hidden, table = matrix(2, 7, WIDTH, seed=3, dtype=torch.float32), expand(cores)[:ROWS]
    results = {}
    for ahead in (True, False):
        monkeypatch.setattr(TrainShape, "expands", lambda self, count, tokens, ahead=ahead: ahead)
        results[ahead] = scores(hidden, cores, SHAPE, ROWS)
    monkeypatch.undo()
    scale = results[True].abs().max()
    torch.testing.assert_close(results[True] / scale, results[False] / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(results[True], hidden @ table.T, rtol=1e-4, atol=1e-3)
    large = TrainShape((25, 30, 42), (8, 8, 12), (32, 32))
    # 1.0 + 82.6 + 8.1 million multiply-adds to contract, against 23.4 million and 0.78 thousand million once.
    assert large.contraction_flops() == 2 * (8 * 8 * 42 * 32 * 12 + 8 * 30 * 42 * 32 * 8 * 32 + 31_500 * 32 * 8)
    assert large.expansion_flops(30_522) == 2 * (25 * 8 * 32 * 30 * 8 * 32 + 25 * 30 * 64 * 32 * 42 * 12)
    assert [large.expands(30_522, tokens) for tokens in (1, 12, 13, 500)] == [False, False, True, True]
    small = TrainShape((25, 30, 42), (8, 8, 12), (8, 8))
    assert not small.expands(30_522, 10_000)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_factors_suffice_are_balanced_and_multiply_out(order):
    for count in (7, 96, 512, 8000, 30_522, 50_257):
        rows = row_factors(count, order)
        assert len(rows) == order
        assert count <= math.prod(rows) <= 1.15 * count + 2
        assert max(rows) <= 2 * min(rows) + 2
    assert {column_factors(width, 3) for width in (768, 384, 64)} == {(8, 8, 12), (6, 8, 8), (4, 4, 4)}
    assert math.prod(column_factors(97, order)) == 97


def test_published_parameter_counts():
    table = {
        (16, 16): 72_704,
        (32, 32): 268_288,
        (64, 64): 1_028_096,
        (128, 128): 4_022_272,
    }
    for ranks, numbers in table.items():
        assert TrainShape((25, 30, 42), (8, 8, 12), ranks).numbers == numbers


def test_ranks_are_cut_to_what_they_can_use():
    assert clipped((3, 4, 5), (2, 3, 4), (100, 100)) == (6, 20)
    assert clipped((3, 4, 5), (2, 3, 4), (5, 9)) == (5, 9)
    assert clipped((3, 4, 5), (2, 3, 4), (1, 100)) == (1, 12)


@pytest.mark.parametrize(("rows", "columns"), [((3, 4, 5), (2, 3, 4)), ((8, 8), (4, 6)), ((2, 3, 3, 4), (2, 2, 3, 2))])
def test_full_ranks_reproduce_the_table(rows, columns):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        weight = matrix(ROWS, WIDTH, dtype=dtype)
        way = method(rank=10**6, row_factors=rows, column_factors=columns)
        part = fitted(way, site(dtype=str(dtype).removeprefix("torch.")), weight)
        torch.testing.assert_close(part.merged(), weight, rtol=0, atol=tolerance)


def test_error_falls_with_the_rank_and_stays_within_the_bound_of_the_unfoldings():
    weight = matrix(60, WIDTH)
    unfoldings = []
    grid = weight.view(3, 4, 5, 2, 3, 4).permute(0, 3, 1, 4, 2, 5)
    for count in (6, 72):
        unfoldings.append(torch.linalg.svdvals(grid.reshape(count, -1)).square())
    errors = []
    for rank in (1, 2, 4, 6, 8, 12, 20):
        part = fitted(method(rank=rank, row_factors=(3, 4, 5), column_factors=(2, 3, 4), sweeps=0), site(60), weight)
        errors.append((part.merged() - weight).square().sum().item())
        best = [values[rank:].sum().item() for values in unfoldings]
        assert max(best) - 1e-9 <= errors[-1] <= sum(best) + 1e-9
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("tolerance", [0.0, 0.2, 0.5, 0.9])
def test_ranks_found_for_a_tolerance_keep_it_and_no_smaller_one_does_at_the_last_step(tolerance):
    weight = matrix(60, 4) @ matrix(4, WIDTH, seed=1) + 0.3 * matrix(60, WIDTH, seed=2)
    way = method(rank=1, row_factors=(3, 4, 5), column_factors=(2, 3, 4), sweeps=0)
    ranks = way.ranks_within(site(60), weight, tolerance, Calibration())
    part = fitted(method(**way.knobs.model_dump() | {"rank": ranks}), site(60), weight)
    assert (part.merged() - weight).norm() <= tolerance * weight.norm() + 1e-9
    energies = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert [within(one, 2)(1, energies) for one in (0.0, 0.3163, 0.548, 0.7747, 1.0)] == [4, 3, 2, 1, 1]
    with pytest.raises(TautError, match="tolerance = 1.5: expected at least 0 and below 1"):
        way.ranks_within(site(60), weight, 1.5, Calibration())


def test_least_squares_never_raise_the_weighted_error_and_are_exact_where_the_table_is_a_train():
    weight, weights = matrix(SHAPE.capacity, WIDTH), torch.rand(SHAPE.capacity, dtype=torch.float64) ** 4
    weights[50:] = 0
    cores = decompose(weight, SHAPE.rows, SHAPE.columns, lambda step, _: SHAPE.ranks[step - 1])
    errors = []
    for _ in range(6):
        errors.append(((expand(cores) - weight).square().sum(1) * weights).sum().item())
        cores = refine(cores, weight, weights, 1)
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0]
    exact = expand(random_cores(SHAPE))
    target = torch.where(weights[:, None] > 0, exact, 100 * weight)
    near = [core + 0.05 * matrix(*core.shape, seed=7) for core in random_cores(SHAPE)]
    refined = expand(refine(near, target, (weights > 0).double(), 100))
    torch.testing.assert_close(refined[:50], exact[:50], rtol=0, atol=1e-4)


def test_separable_weights_are_recognised_and_make_the_decomposition_optimal_for_them():
    own = [torch.rand(count, dtype=torch.float64) + 0.1 for count in SHAPE.rows]
    weights = torch.einsum("a,b,c->abc", *own).flatten()
    product = torch.einsum("a,b,c->abc", *separable(weights, SHAPE.rows)).flatten()
    torch.testing.assert_close(product / product.sum(), weights / weights.sum())


@pytest.mark.parametrize("bits", [1, 3, 7, 8, 13, 16, 17, 25])
@pytest.mark.parametrize("count", [1, 5, 8, 33])
def test_packed_integers_come_back(bits, count):
    values = torch.randint(2**bits, (count,), generator=torch.Generator().manual_seed(bits))
    packed = pack_integers(values, bits)
    assert len(packed) == packed_bytes(count, bits) == math.ceil(count * bits / 8)
    places = torch.randperm(count)
    assert torch.equal(read_integers(packed, places, bits), values[places])
    assert [bits_below(number) for number in (1, 2, 3, 4, 5, 256, 257)] == [1, 1, 2, 2, 3, 8, 9]
