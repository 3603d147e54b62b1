"""Frequency bands: exact sums, the best fit of every band, and lookups across band edges, in double precision."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from taut.core.errors import TautError
from taut.core.site import TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.adaptive import AdaptiveEmbedding, AdaptiveTable

CPU = torch.device("cpu")
THIRDS = {"bands": [0.2, 0.3, 0.5], "factor": 2}


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(rows: int = 60, width: int = 16, dtype: str = "float64", **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", dtype=dtype, rows=rows, width=width, **fields)


def counts(rows: int = 60, seed: int = 3) -> Tensor:
    """Zipf's law in no particular order, and a few tokens that were never seen."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    seen = (1000 / torch.arange(1.0, rows + 1, dtype=torch.float64)).floor()
    seen[-5:] = 0
    return seen[order.argsort()]


def adaptive(rank: int | None = 8, **knobs) -> AdaptiveEmbedding:
    return AdaptiveEmbedding.parse({"rank": rank, **THIRDS, **knobs})


def fitted(method: AdaptiveEmbedding, site: TableSite, weight: Tensor, frequency: Tensor | None = None):
    part = method.build(site, CPU, getattr(torch, site.dtype))
    method.fit(part, weight, Calibration(frequency=frequency))
    return part


def bands(part: AdaptiveTable) -> list[Tensor]:
    return [(part.places.classes == band).nonzero().squeeze(1) for band in range(len(part.shapes))]


def test_the_most_frequent_rows_lie_in_the_first_band_and_unseen_ones_in_the_last():
    seen = counts()
    part = fitted(adaptive(), table(), matrix(60, 16), seen)
    members = bands(part)
    assert [len(rows) for rows in members] == [12, 18, 30]
    assert seen[members[0]].min() >= seen[members[1]].max()
    assert seen[members[1]].min() >= seen[members[2]].max()
    assert set((seen == 0).nonzero().squeeze(1).tolist()) <= set(members[2].tolist())


def test_without_frequencies_the_bands_follow_the_given_order():
    weight = matrix(60, 16)
    part = fitted(adaptive(), table(), weight)
    assert part.places.classes.tolist() == [0] * 12 + [1] * 18 + [2] * 30
    falling = fitted(adaptive(weighting=0), table(), weight, torch.arange(60.0, 0, -1))
    torch.testing.assert_close(falling.merged(), part.merged(), rtol=0, atol=0)


def test_full_width_bands_reproduce_the_table():
    weight = matrix(60, 16)
    part = fitted(adaptive(16, factor=1), table(), weight, counts())
    torch.testing.assert_close(part.merged(), weight, rtol=0, atol=1e-10)
    single = fitted(adaptive(16, factor=1), table(dtype="float32"), weight.float(), counts())
    torch.testing.assert_close(single.merged(), weight.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("weighting", [0.0, 0.5, 1.0])
def test_every_band_loses_exactly_its_discarded_singular_values(weighting):
    weight, seen = matrix(60, 16), counts()
    part = fitted(adaptive(weighting=weighting), table(), weight, seen)
    share = (seen + 1).pow(weighting)[:, None]
    for rows, (_, rank) in zip(bands(part), part.shapes, strict=True):
        lost = ((weight - part.merged())[rows].square() * share[rows]).sum()
        optimum = torch.linalg.svdvals(weight[rows] * share[rows].sqrt())[rank:].square().sum()
        torch.testing.assert_close(lost, optimum, rtol=1e-9, atol=1e-10)


def test_lookup_across_band_edges_and_tied_head_are_those_of_the_merged_table():
    weight = matrix(60, 16)
    weight[3] = 0
    part = fitted(adaptive(), table(scale=4.0, padding_row=3, heads=("head",)), weight, counts())
    first, second, third = (rows[[0, -1]] for rows in bands(part))
    ids = torch.stack((torch.cat((first, second, third)), torch.cat((third, first, torch.tensor([3, 3])))))
    hidden = matrix(2, 3, 16, seed=5)
    torch.testing.assert_close(part(ids), part.merged()[ids] * 4.0, rtol=0, atol=1e-12)
    torch.testing.assert_close(part(ids.int()), part(ids), rtol=0, atol=0)
    torch.testing.assert_close(part.logits(hidden), hidden @ part.merged().T, rtol=0, atol=1e-12)
    probabilities = part.logits(hidden).softmax(-1).sum(-1)
    torch.testing.assert_close(probabilities, torch.ones_like(probabilities), rtol=0, atol=1e-12)
    assert part(torch.tensor(3)).abs().max() == 0
    assert part(torch.empty(0, dtype=torch.long)).shape == (0, 16)
    for wrong in (60, -1):
        with pytest.raises(IndexError):
            part(torch.tensor([0, wrong]))


def test_a_vector_does_not_depend_on_its_neighbours_to_the_last_bit():
    part = fitted(adaptive(), table(dtype="float32"), matrix(60, 16).float(), counts())
    ids = torch.arange(20)
    whole = part(ids)
    for last in range(20, 60):
        assert torch.equal(part(torch.cat((ids[:-1], torch.tensor([last]))))[:-1], whole[:-1])


def test_gradients_reach_every_band_but_not_the_padding_row():
    weight = matrix(60, 16)
    part = fitted(adaptive(), table(padding_row=7), weight, counts())
    part(torch.arange(60)).square().sum().backward()
    for band, name in enumerate(part.names):
        rows = part.get_parameter(name).grad.view(part.shapes[band]).abs().amax(1)
        padding = part.padding(band)
        assert (rows == 0).nonzero().flatten().tolist() == ([] if padding is None else [padding])
    assert sum(part.padding(band) is not None for band in range(3)) == 1
    part.zero_grad()
    part(bands(part)[0][:1]).sum().backward()
    assert part.projection.grad is not None
    assert part.band_2.grad.abs().max() == 0


@pytest.mark.parametrize("store", [None, {"bits": 8}, {"bits": 4, "group": 4}])
def test_predicted_cost_is_counted_cost_within_keep_and_monotone(store):
    site, counted = table(200, 32, heads=("head",)), []
    for keep in (0.1, 0.25, 0.5, 1.0):
        solved = AdaptiveEmbedding.parse({**THIRDS, "store": store}, keep).solve(site, keep)
        assert solved.fits(site) is None
        part, cost = solved.build(site, CPU, torch.float64), solved.predict(site)
        assert cost.parameters == part.numbers() <= site.dense().parameters
        assert cost.bytes == sum(one.nbytes for one in part.state_dict().values()) <= keep * site.dense().bytes
        wider = AdaptiveEmbedding.parse({"rank": solved.rank + 1, **THIRDS, "store": store})
        assert wider.fits(site) is not None or wider.predict(site).bytes > keep * site.dense().bytes
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(torch.arange(10))
            part.logits(torch.randn(10, 32, dtype=torch.float64))
        assert cost.flops_per_token == counter.get_total_flops() / 10
        skeleton = solved.build(site, torch.device("meta"), torch.float64).state_dict()
        assert {key: one.shape for key, one in skeleton.items()} == {k: v.shape for k, v in part.state_dict().items()}
        counted.append((cost.bytes, cost.flops_per_token))
    assert counted == sorted(counted)


def test_widths_and_map_are_those_of_the_paper():
    method = AdaptiveEmbedding.parse({"rank": 1024, "bands": [0.0747, 0.1494, 0.7759]})
    site = table(267_744, 1024, "float32")
    shapes = method._shapes(site)
    assert [rank for _, rank in shapes] == [1024, 256, 64]
    assert [rows for rows, _ in shapes] == [20_000, 40_001, 207_743]
    numbers = sum(rank * (rows + 1024) for rows, rank in shapes)
    assert method.predict(site).parameters == numbers
    assert method.predict(site).bytes == 4 * numbers + 267_744 * 2 // 8


def test_a_copy_and_a_loaded_table_use_their_own_map():
    weight = matrix(60, 16)
    part, other = fitted(adaptive(), table(), weight, counts()), fitted(adaptive(), table(), weight, counts(seed=9))
    before, twin = other.merged(), copy.deepcopy(other)
    ids = torch.arange(60)
    other.load_state_dict(part.state_dict())
    torch.testing.assert_close(other(ids), part(ids), rtol=0, atol=0)
    torch.testing.assert_close(twin.merged(), before, rtol=0, atol=0)
    assert not torch.equal(before, part.merged())


def test_unpacked_parts_compute_what_repacking_stores_and_can_be_trained():
    weight = matrix(60, 16)
    part = fitted(adaptive(weighting=1, store={"bits": 4, "group": 4}), table(), weight, counts())
    shapes = {name: (one.shape, one.dtype) for name, one in part.state_dict().items()}
    before, ids = part.merged(), torch.arange(60)
    part.unpack(weight)
    torch.testing.assert_close(part(ids), before, rtol=0, atol=0.02)
    rate = torch.optim.Adam(part.parameters(), 0.01)
    for _ in range(80):
        rate.zero_grad()
        (part(ids) - weight).square().mean().backward()
        rate.step()
    unpacked = part(ids).detach()
    part.repack()
    assert {name: (one.shape, one.dtype) for name, one in part.state_dict().items()} == shapes
    torch.testing.assert_close(part(ids), unpacked, rtol=0, atol=1e-6)
    assert (part.merged() - weight).square().mean() < 0.98 * (before - weight).square().mean()


def test_a_random_start_has_the_standard_deviation():
    torch.manual_seed(0)
    part = adaptive(32, factor=2).build(table(4000, 64, padding_row=0), CPU, torch.float64)
    assert part.merged().std().item() == pytest.approx(0.02, rel=0.05)
    assert part.merged()[0].abs().max() == 0


def test_the_same_weight_gives_the_same_bits():
    first, second = (fitted(adaptive(), table(), matrix(60, 16), counts()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wrong_input_is_refused_with_the_reason():
    site = table()
    assert "may be at most 16" in adaptive(17).fits(site)
    assert "does not reduce" in adaptive(16, factor=1).fits(site)
    assert "empty" in adaptive(2, bands=[0.5, 0.499, 0.001]).fits(site)
    with pytest.raises(TautError, match="sum is 1"):
        adaptive(bands=[0.5, 0.3])
    with pytest.raises(TautError, match="factor"):
        adaptive(factor=0.5)
    with pytest.raises(TautError, match="give keep or rank"):
        AdaptiveEmbedding.parse({})
    with pytest.raises(TautError, match="leaves no rank"):
        AdaptiveEmbedding.parse({}, 0.001).solve(site, 0.001)
