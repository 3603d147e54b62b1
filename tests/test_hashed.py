"""Hash embeddings: hash functions that are the same everywhere, a fit that only improves, exact accounting."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.core.site import TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.hashed.hashing import best_weights, combine, fit_buckets, hashed, mix
from taut.methods.embedding.hashed.method import HashedEmbedding

CPU = torch.device("cpu")
STORES = [None, {"bits": 8}, {"bits": 4, "group": 8}]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(rows: int = 90, width: int = 16, **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", dtype="float64", rows=rows, width=width, **fields)


def fitted(site: TableSite, weight: Tensor, calibration: Calibration | None = None, **knobs):
    method = HashedEmbedding.parse(knobs)
    part = method.build(site, CPU, torch.float64)
    method.fit(part, weight, calibration or Calibration())
    return part


def unsigned(numbers: Tensor) -> list[int]:
    return [number % 2**64 for number in numbers.tolist()]


def test_the_mix_is_splitmix64():
    """The published first outputs for the seeds 0 and 1234567."""
    assert unsigned(mix(torch.tensor([0, 1234567]))) == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_buckets_are_pinned_so_that_stored_tables_stay_readable():
    assert hashed(torch.arange(5), 3, 1000).tolist() == [
        [883, 766, 905],
        [566, 126, 767],
        [591, 700, 657],
        [113, 632, 930],
        [431, 386, 239],
    ]
    ids = torch.randint(0, 100_000, (3, 4))
    assert torch.equal(hashed(ids.int(), 2, 77), hashed(ids, 2, 77))
    assert torch.equal(hashed(ids, 4, 77)[..., :2], hashed(ids, 2, 77))


@pytest.mark.parametrize("buckets", [64, 1000, 7919])
def test_buckets_are_used_and_shared_as_often_as_chance_would(buckets):
    tokens = 30_000
    index = hashed(torch.arange(tokens), 2, buckets)
    assert index.min() >= 0
    assert index.max() < buckets
    pairs = tokens * (tokens - 1) / 2
    for function in range(2):
        sizes = torch.bincount(index[:, function], minlength=buckets).double()
        shared = float((sizes * (sizes - 1)).sum() / 2)
        deviation = (pairs / buckets * (1 - 1 / buckets)) ** 0.5
        assert abs(shared - pairs / buckets) < 4 * deviation
    # Independent functions: both buckets alike as rarely as the square says.
    both = torch.bincount(index[:, 0] * buckets + index[:, 1]).double()
    expected = pairs / buckets**2
    assert abs(float((both * (both - 1)).sum() / 2) - expected) < 4 * expected**0.5 + 1


def test_a_bucket_for_each_token_is_exact():
    weight = matrix(40, 8)
    buckets, weights, errors = fit_buckets(weight, torch.arange(40)[:, None], 40, None, rounds=1, steps=1, seed=0)
    assert errors[0] < 1e-15
    torch.testing.assert_close(combine(buckets, torch.arange(40)[:, None], weights), weight, rtol=0, atol=1e-9)


def test_each_half_of_the_fit_solves_its_least_squares_problem():
    weight, index = matrix(60, 8), hashed(torch.arange(60), 3, 20)
    importance = matrix(60, seed=3).abs() + 0.1
    buckets, weights, _ = fit_buckets(weight, index, 20, importance, rounds=1, steps=200, seed=5)
    signs = torch.randint(0, 2, index.shape, generator=torch.Generator().manual_seed(5)).double() * 2 - 1
    spread = torch.zeros(60, 20, dtype=torch.float64).scatter_add_(1, index, signs)
    root = importance.sqrt()[:, None]
    solved = torch.linalg.lstsq(root * spread, root * weight, driver="gelsd").solution
    torch.testing.assert_close(combine(buckets, index, signs), spread @ solved, rtol=0, atol=1e-8)
    residual = weight - combine(buckets, index, weights)
    assert (buckets[index] @ residual[..., None]).abs().max() < 1e-6
    torch.testing.assert_close(best_weights(weight, buckets, index), weights, rtol=0, atol=0)


@pytest.mark.parametrize("hashes", [1, 2, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_error_never_rises(hashes, weighted):
    weight, index = matrix(120, 12), hashed(torch.arange(120), hashes, 30)
    importance = matrix(120, seed=2).square() if weighted else None
    _, _, errors = fit_buckets(weight, index, 30, importance, rounds=15, steps=3, seed=0)
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < errors[0] < float((weight.square().sum(1) * (1 if importance is None else importance)).sum())


def test_weights_of_use_move_the_error_to_rare_tokens():
    weight, frequency = matrix(90, 16), torch.zeros(90, dtype=torch.float64)
    frequency[:20] = 1e6
    plain = fitted(table(), weight, buckets=30)
    weighted = fitted(table(), weight, Calibration(frequency=frequency), buckets=30, weighted=True)
    gaps = [(weight - part.merged())[:20].square().sum() for part in (plain, weighted)]
    assert gaps[1] < 0.5 * gaps[0]


@pytest.mark.parametrize("store", STORES)
def test_lookup_head_and_dense_equivalent_are_the_formula(store):
    site, weight = table(scale=4.0, padding_row=3, heads=("head",)), matrix(90, 16)
    part = fitted(site, weight, buckets=25, hashes=3, store=store)
    own = part.held("importance").reshape(-1, 3)
    buckets, index = part.held("weight"), hashed(torch.arange(90), 3, 25)
    dense = torch.stack([sum(own[v, i] * buckets[index[v, i]] for i in range(3)) for v in range(90)])
    ids, hidden = torch.tensor([[0, 3, 89], [7, 7, 1]]), matrix(2, 3, 16, seed=5)
    torch.testing.assert_close(part.merged(), dense, rtol=0, atol=1e-12)
    # Fused lookups of stored rows round in float32.
    torch.testing.assert_close(part(ids), dense[ids] * 4.0, rtol=0, atol=1e-12 if store is None else 1e-5)
    torch.testing.assert_close(part(ids.int()), part(ids), rtol=0, atol=0)
    torch.testing.assert_close(part.logits(hidden), hidden @ dense.T, rtol=0, atol=1e-10)
    assert (dense - weight).norm() < 0.95 * weight.norm()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("rows", [64, 90])
def test_the_account_is_exact(store, rows):
    site = table(rows, heads=("head",))
    method = HashedEmbedding.parse({"buckets": 20, "hashes": 2, "store": store})
    part, cost = method.build(site, CPU, torch.float64), method.predict(site)
    assert cost.bytes == sum(tensor.nbytes for tensor in part.state_dict().values())
    assert cost.parameters == part.numbers()
    assert cost.flops_per_token == 2 * 20 * 16
    if store is None:
        assert cost.parameters == 20 * 16 + rows * 2


@pytest.mark.parametrize("store", STORES)
def test_keep_buys_the_most_buckets(store):
    site, keep = table(400, 32), 0.4 if store is None else 0.04
    method = HashedEmbedding.parse({"store": store}, keep=keep).solve(site, keep)
    assert method.predict(site).bytes <= keep * site.dense().bytes
    one_more = HashedEmbedding.parse({"buckets": method.buckets + 1, "store": store})
    assert one_more.predict(site).bytes > keep * site.dense().bytes


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("wrong", [90, 95, 1000, -1])
def test_an_unknown_token_is_an_index_error(store, wrong):
    part = fitted(table(), matrix(90, 16), buckets=25, store=store)
    with pytest.raises(IndexError):
        part(torch.tensor([1, wrong]))


def test_from_scratch_entries_have_the_usual_deviation_and_padding_is_zero():
    torch.manual_seed(0)
    method = HashedEmbedding.parse({"buckets": 200, "hashes": 3})
    part = method.build(table(2000, 32, padding_row=5), CPU, torch.float64)
    dense = part.merged()
    assert float(dense.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not dense[5].any()


def test_the_same_seed_gives_the_same_bits_and_padding_gets_no_gradient():
    site, weight = table(padding_row=3), matrix(90, 16)
    first, second = (fitted(site, weight, buckets=25) for _ in range(2))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    first(torch.tensor([3, 3])).square().sum().backward()
    assert not any(parameter.grad.any() for parameter in first.parameters())
    first(torch.tensor([3, 4])).square().sum().backward()
    assert all(parameter.grad.any() for parameter in first.parameters())


@pytest.mark.parametrize("store", STORES[1:])
def test_unpacked_it_computes_what_it_will_when_repacked_and_training_helps(store):
    weight, ids = matrix(90, 16), torch.arange(90)
    part = fitted(table(), weight, buckets=45, rounds=2, store=store)
    before, names = part(ids), {name: (t.shape, t.dtype) for name, t in part.state_dict().items()}
    part.unpack(weight)
    unpacked = part(ids)
    part.repack()
    torch.testing.assert_close(part(ids), unpacked, rtol=0, atol=1e-4)
    torch.testing.assert_close(unpacked, before, rtol=0, atol=0.25 * float(weight.std()))
    assert {name: (t.shape, t.dtype) for name, t in part.state_dict().items()} == names
    start = (part(ids) - weight).square().sum()
    part.unpack()
    optimiser = torch.optim.Adam(part.parameters(), lr=0.01)
    for _ in range(40):
        optimiser.zero_grad()
        (part(ids) - weight).square().sum().backward()
        optimiser.step()
    part.repack()
    assert (part(ids) - weight).square().sum() < 0.95 * start


def test_a_copy_is_independent():
    part = fitted(table(), matrix(90, 16), buckets=25)
    twin, before = copy.deepcopy(part), part(torch.arange(90)).detach()
    with torch.no_grad():
        part.weight.zero_()
    assert torch.equal(twin(torch.arange(90)), before)


def test_wrong_input_is_one_clear_line():
    site = table()
    assert "at most 67 buckets" in HashedEmbedding.parse({"buckets": 68}).fits(site)
    assert HashedEmbedding.parse({"buckets": 67}).fits(site) is None
    assert "do not reduce rows of 2" in HashedEmbedding.parse({"buckets": 1}).fits(table(width=2))
    with pytest.raises(TautError, match="leaves no buckets at embedding .* the least is"):
        HashedEmbedding.parse({}, keep=0.01).solve(site, 0.01)
    with pytest.raises(TautError, match="give keep or buckets"):
        HashedEmbedding.parse({})
    with pytest.raises(TautError, match="weighted needs token frequencies"):
        fitted(site, matrix(90, 16), buckets=20, weighted=True)
    with pytest.raises(TautError, match="hashes = 0"):
        HashedEmbedding.parse({"buckets": 3, "hashes": 0})
