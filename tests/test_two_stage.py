"""A code for every row and a finer one for some: exact sums, which rows are chosen, and what healing may change."""

import copy

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from taut.core.errors import TautError
from taut.core.site import TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.two_stage.basis import balanced, coding_basis
from taut.methods.embedding.two_stage.method import TwoStageEmbedding
from taut.ops.codebooks.product_codes import decode_lengths
from taut.ops.quantization.rowwise import RowFormat, pack, unpack
from taut.ops.tables.bands import map_bytes

CPU = torch.device("cpu")
SMALL = {"centroids": 16, "subvector": 4, "fine_subvector": 2}
NEAREST_LENGTH = 2 ** (1 / 32) - 1
"""Lengths are kept to this relative error."""


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(rows: int = 120, width: int = 16, dtype: str = "float64", **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", dtype=dtype, rows=rows, width=width, **fields)


def counts(rows: int = 120) -> Tensor:
    """Zipf's law in no particular order; the rarest fifth was never seen."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(3))
    seen = (1000 / torch.arange(1.0, rows + 1, dtype=torch.float64)).floor()
    seen[-rows // 5 :] = 0
    return seen[order.argsort()]


def two_stage(**knobs) -> TwoStageEmbedding:
    return TwoStageEmbedding.parse({"refine": 0.4, **SMALL, **knobs})


def fitted(method: TwoStageEmbedding, site: TableSite, weight: Tensor, frequency: Tensor | None = None, seed: int = 0):
    part = method.build(site, CPU, getattr(torch, site.dtype))
    method.fit(part, weight, Calibration(frequency=counts(len(weight)) if frequency is None else frequency, seed=seed))
    return part


def error(part, weight: Tensor) -> Tensor:
    return (part.merged() - weight).square().sum(1)


@pytest.mark.parametrize("knobs", [{}, {"rank": 12}, {"bits": 3, "group": 5}, {"rank": 8, "bits": 4}, {"refine": 0.0}])
def test_lookup_and_tied_head_are_those_of_the_merged_table(knobs):
    weight = matrix(120, 16)
    weight[3] = 0
    part = fitted(two_stage(**knobs), table(scale=4.0, padding_row=3, heads=("head",)), weight)
    ids, hidden = torch.tensor([[0, 3, 119], [7, 7, 1]]), matrix(2, 3, 16, seed=5)
    torch.testing.assert_close(part(ids), part.merged()[ids] * 4.0, rtol=0, atol=1e-12)
    torch.testing.assert_close(part(ids.int()), part(ids), rtol=0, atol=0)
    expected = hidden @ part.merged().T
    torch.testing.assert_close(part.logits(hidden), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(part.logits(hidden), expected, rtol=0, atol=1e-5)
    assert part(torch.tensor(3)).abs().max() == 0
    assert part(torch.empty(0, dtype=torch.long)).shape == (0, 16)
    for wrong in (120, -1):
        with pytest.raises(IndexError):
            part(torch.tensor([0, wrong]))


def test_a_vector_does_not_depend_on_its_neighbours_to_the_last_bit():
    part = fitted(two_stage(rank=12), table(dtype="float32"), matrix(120, 16).float())
    ids = torch.arange(20)
    whole = part(ids)
    for last in range(20, 120):
        assert torch.equal(part(torch.cat((ids[:-1], torch.tensor([last]))))[:-1], whole[:-1])


@pytest.mark.parametrize("rank", [None, 16])
def test_the_second_stage_lowers_the_error_of_its_rows_and_of_no_other(rank):
    weight = matrix(120, 16)
    coarse, part = (
        fitted(two_stage(rank=rank, refine=0.0), table(), weight),
        fitted(two_stage(rank=rank), table(), weight),
    )
    member = part.places.classes.bool()
    assert int(member.sum()) == 48
    torch.testing.assert_close(part.merged()[~member], coarse.merged()[~member], rtol=0, atol=0)
    assert error(part, weight)[member].mean() < 0.7 * error(coarse, weight)[member].mean()
    finer = fitted(two_stage(rank=rank, bits=8), table(), weight)
    assert error(finer, weight)[finer.places.classes.bool()].mean() < 0.5 * error(part, weight)[member].mean()


def test_rows_are_chosen_by_importance_times_what_the_first_stage_left():
    weight, seen = matrix(120, 16), counts()
    for importance, weighting in (("frequency", 1.0), ("frequency", 0.5), ("error", 0.5), ("sensitivity", 1.0)):
        method = two_stage(importance=importance, weighting=weighting)
        part = method.build(table(), CPU, torch.float64)
        steep = seen * matrix(120, seed=8).square()
        method.fit(part, weight, Calibration(frequency=seen, sensitivity=steep))
        points = part.points(weight)
        left = part.left(points).square().sum(1).double()
        unseen = 0.5 * (steep[seen > 0] / seen[seen > 0]).median()
        share = {"frequency": seen + 0.5, "sensitivity": steep + unseen, "error": torch.ones(120)}[importance]
        worth = left * share.double() ** weighting
        member = part.places.classes.bool()
        assert worth[member].min() >= worth[~member].max() * (1 - 1e-5)
        assert method.needs == (set() if importance == "error" else {"frequency", importance})


def test_rows_keep_their_lengths():
    weight = matrix(120, 16) * torch.linspace(0.01, 3, 120, dtype=torch.float64)[:, None]
    for knobs in ({}, {"rank": 8}, {"refine": 0.0}):
        lengths = fitted(two_stage(**knobs), table(), weight).merged().norm(dim=1)
        torch.testing.assert_close(lengths, weight.norm(dim=1), rtol=NEAREST_LENGTH + 1e-6, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_all_rows_refined_are_the_first_stage_plus_the_residual_in_few_bits(bits):
    weight = matrix(120, 16)
    part = fitted(two_stage(refine=1.0, bits=bits, group=8), table(), weight)
    points = part.points(weight)
    layout = RowFormat(bits, 16, 8)
    rounded = unpack(pack(part.left(points), layout, clip=True), layout)
    coordinates = (points - part.left(points) + rounded).double()
    lengths = decode_lengths(part.lengths, torch.float64)[:, None]
    torch.testing.assert_close(part.merged(), coordinates * lengths, rtol=0, atol=1e-5)
    if bits == 8:
        within = weight.norm(dim=1, keepdim=True) * NEAREST_LENGTH + 0.03
        assert ((part.merged() - weight).norm(dim=1, keepdim=True) < within).all()


def test_few_different_rows_come_back_up_to_their_lengths():
    weight = matrix(10, 16)[torch.arange(120) % 10]
    part = fitted(two_stage(refine=0.0), table(), weight)
    cosine = torch.nn.functional.cosine_similarity(part.merged(), weight)
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-6)


def test_directions_are_orthonormal_principal_and_evenly_shared_out():
    weight, share = matrix(200, 12) * torch.arange(1.0, 13).double(), matrix(200, seed=2).square()
    basis = coding_basis(weight, share, 8, 4)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)
    lost = ((weight - weight @ basis.T @ basis).square().sum(1) * share).sum()
    optimum = torch.linalg.svdvals(weight * share.sqrt()[:, None])[8:].square().sum()
    torch.testing.assert_close(lost, optimum, rtol=1e-9, atol=0)
    values = torch.tensor([64.0, 32, 16, 8, 4, 2], dtype=torch.float64)
    groups = balanced(values, 3).view(3, 2)
    assert sorted(groups.flatten().tolist()) == list(range(6))
    assert values[groups].prod(1).tolist() == [128, 128, 128]
    in_order = values.view(3, 2).prod(1)
    assert values[balanced(values, 2).view(2, 3)].prod(1).log().std() < in_order.log().std()


@pytest.mark.parametrize("knobs", [{}, {"rank": 16}, {"bits": 4, "group": 6}, {"store": {"bits": 4, "group": 8}}])
def test_predicted_cost_is_counted_cost_within_keep_and_monotone(knobs):
    site, counted = table(400, 32, heads=("head",)), []
    for keep in (0.1, 0.12, 0.14, 0.2):
        solved = TwoStageEmbedding.parse({**SMALL, **knobs}, keep).solve(site, keep)
        assert solved.fits(site) is None
        part, cost = solved.build(site, CPU, torch.float64), solved.predict(site)
        assert cost.parameters == part.numbers() == site.dense().parameters
        assert cost.bytes == sum(one.nbytes for one in part.state_dict().values()) <= keep * site.dense().bytes
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(torch.arange(10))
            part.logits(torch.randn(10, 32, dtype=torch.float64))
        assert cost.flops_per_token == counter.get_total_flops() / 10
        skeleton = solved.build(site, torch.device("meta"), torch.float64).state_dict()
        assert {key: one.shape for key, one in skeleton.items()} == {k: v.shape for k, v in part.state_dict().items()}
        counted.append((cost.bytes, cost.flops_per_token))
    assert counted == sorted(counted)


def test_bytes_are_codes_lengths_map_and_codebooks():
    method = TwoStageEmbedding.parse({"refine": 0.25, "subvector": 32, "fine_subvector": 8, "rank": 256})
    rows, site = 30522, table(30522, 384, "float32")
    floats = 4 * (256 * 256 + 256 * 256 + 256 * 384)
    refined = round(0.25 * rows)
    assert method.predict(site).bytes == rows * (8 + 1) + refined * 32 + map_bytes(rows, 2) + floats
    keep = method.predict(site).bytes / site.dense().bytes
    solved = TwoStageEmbedding.parse({"subvector": 32, "fine_subvector": 8, "rank": 256}, keep).solve(site, keep)
    assert round(solved.refine * rows) == refined


def test_unpacked_parts_compute_what_repacking_stores():
    weight, ids = matrix(120, 16), torch.arange(120)
    weight[3] = 0
    for knobs in ({"rank": 12}, {"bits": 4}, {"store": {"bits": 4, "group": 8}, "rank": 12}, {"refine": 0.0}):
        part = fitted(two_stage(**knobs), table(padding_row=3), weight)
        before = copy.deepcopy(part.state_dict())
        part.unpack(weight)
        torch.testing.assert_close(part(ids), part.merged(), rtol=0, atol=1e-12)
        unpacked = part(ids).detach()
        assert unpacked[3].abs().max() == 0
        part.repack()
        torch.testing.assert_close(part(ids), unpacked, rtol=0, atol=1e-6)
        after = part.state_dict()
        assert {name: (one.shape, one.dtype) for name, one in after.items()} == {
            name: (one.shape, one.dtype) for name, one in before.items()
        }
        assert torch.equal(after["weight"], before["weight"])
        assert torch.equal(after["lengths"], before["lengths"])


@pytest.mark.parametrize("choose", [True, False])
@pytest.mark.parametrize("knobs", [{"rank": 12}, {"bits": 3}, {"store": {"bits": 4, "group": 8}}])
def test_healing_lowers_the_error_and_may_choose_other_codes(knobs, choose):
    weight, ids = matrix(120, 16), torch.arange(120)
    weight[3] = 0
    part = fitted(two_stage(**knobs), table(padding_row=3), weight)
    codes, before = part.weight.clone(), error(part, weight).mean()
    part.unpack(weight if choose else None)
    steps = torch.optim.Adam(part.parameters(), 0.01)
    for _ in range(60):
        steps.zero_grad()
        (part(ids) - weight).square().mean().backward()
        steps.step()
    part.repack()
    assert error(part, weight).mean() < 0.99 * before
    assert torch.equal(part.weight, codes) != choose
    assert part(torch.tensor(3)).abs().max() == 0


def test_gradients_reach_codebooks_and_directions():
    part = fitted(two_stage(rank=8), table(40, 8), matrix(40, 8))
    ids, names = torch.arange(12), [name for name, _ in part.named_parameters()]
    assert set(names) == {"codebook", "fine_codebook", "projection"}
    hidden = matrix(3, 8, seed=7).requires_grad_()

    def both(hidden: Tensor, *tensors: Tensor) -> Tensor:
        state = dict(zip(names, tensors, strict=True))
        return torch.func.functional_call(part, state, (ids,)) @ hidden.T

    assert torch.autograd.gradcheck(both, (hidden, *part.parameters()))
    part.logits(hidden).square().sum().backward()
    expected = torch.autograd.grad((hidden @ part.merged().detach().T).square().sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    part.zero_grad()
    part(part.places.classes.bool().logical_not().nonzero()[:2, 0]).sum().backward()
    assert part.fine_codebook.grad.abs().max() == 0


def test_a_copy_and_a_loaded_table_use_their_own_map():
    weight, ids = matrix(120, 16), torch.arange(120)
    part, other = fitted(two_stage(), table(), weight), fitted(two_stage(), table(), weight, counts().flip(0))
    before, twin = other.merged(), copy.deepcopy(other)
    other.load_state_dict(part.state_dict())
    torch.testing.assert_close(other(ids), part(ids), rtol=0, atol=0)
    torch.testing.assert_close(twin.merged(), before, rtol=0, atol=0)
    assert not torch.equal(twin.places.classes, other.places.classes)


def test_a_random_start_has_the_standard_deviation():
    torch.manual_seed(0)
    for knobs in ({"rank": 32}, {"bits": 4}, {}):
        part = two_stage(**knobs).build(table(2000, 64, padding_row=0), CPU, torch.float64)
        assert part.merged().std().item() == pytest.approx(0.02, rel=0.05)
        assert part.merged()[0].abs().max() == 0


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    first, second, third = (fitted(two_stage(), table(), matrix(120, 16), seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["weight"], third["weight"])


def test_wrong_input_is_refused_with_the_reason():
    site = table()
    assert "may be at most 16" in two_stage(rank=17).fits(site)
    assert "nearest that does is 4" in two_stage(subvector=5).fits(site)
    assert two_stage(bits=4, fine_subvector=5).fits(site) is None
    assert "fine_subvector 3" in two_stage(rank=8, fine_subvector=3).fits(site)
    assert "120 rows are too few for 256" in two_stage(centroids=256).fits(site)
    assert "too few for 16 centroids; give at least 0.134" in two_stage(refine=0.05).fits(site)
    assert two_stage(refine=0.134).fits(site) is None
    assert two_stage(refine=0.05, bits=4).fits(site) is None
    method = two_stage()
    part = method.build(site, CPU, torch.float64)
    with pytest.raises(TautError, match="needs calibration text"):
        method.fit(part, matrix(120, 16), Calibration())
    with pytest.raises(TautError, match="give keep or refine"):
        TwoStageEmbedding.parse(SMALL)
    with pytest.raises(TautError, match="the first stage alone takes"):
        TwoStageEmbedding.parse(SMALL, 0.01).solve(site, 0.01)
    with pytest.raises(TautError, match="refine"):
        two_stage(refine=1.5)
