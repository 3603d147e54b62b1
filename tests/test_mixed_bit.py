"""Bits for each row: the places of rows, the allocation, and the table they make."""

import copy
import io
import time

import pytest
import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.core.site import LinearSite, TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.mixed_bit.compensation import match, pack_records, unpack_records
from taut.methods.embedding.mixed_bit.method import MixedBitEmbedding, MixedBitTable
from taut.ops.quantization.rowwise import RowFormat, pack, unpack
from taut.ops.tables.allocation import allocate
from taut.ops.tables.bands import banded, map_bytes, pack_classes, places

CPU, META = torch.device("cpu"), torch.device("meta")
COST = torch.tensor([10, 14, 20, 28, 40])
SETTINGS = [
    {"bits": 4.2, "importance": "none"},
    {"bits": 5.5},
    {"bits": 8.5, "choices": [3, 8], "group": 12, "importance": "gradient"},
    {"bits": 6.0, "compensate": True},
    {"bits": "split", "importance": "frequency"},
]


def table(rows: int = 77, width: int = 24, **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", rows=rows, width=width, **fields)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(rows: int = 77, seed: int = 1) -> Calibration:
    """Counts that fall by Zipf's law; the last quarter never occurs."""
    frequency = (1000 / torch.arange(1, rows + 1)).floor().double()
    frequency[-rows // 4 :] = 0
    once = numbers(rows, seed=seed).abs().double() + 0.1
    return Calibration(frequency=frequency, gradient=frequency * once, sensitivity=frequency * once.square())


def fitted(knobs: dict, site: TableSite, weight: Tensor, calibration: Calibration) -> MixedBitTable:
    method = MixedBitEmbedding.parse(knobs)
    assert method.fits(site) is None
    part = method.build(site, META, torch.float32).to_empty(device="cpu")
    method.fit(part, weight, calibration)
    return part


def losses(seed: int, rows: int = 8) -> Tensor:
    """(V, 5) that mostly fall, some rows with a level that is no better than the one below."""
    shrink = torch.tensor([1.0, 0.25, 0.06, 0.004, 0.0003], dtype=torch.float64)
    return numbers(rows, 1, seed=seed).double().exp() * shrink * (0.5 + numbers(rows, 5, seed=seed + 1).double().abs())


def total(loss: Tensor, levels: Tensor) -> float:
    return float(loss.gather(1, levels[:, None]).sum())


# Places --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 33, 1000])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_classes_come_back_with_the_rank_of_each_row_in_its_class(rows, count):
    classes = torch.randint(0, count, (rows,), generator=torch.Generator().manual_seed(rows))
    classes[classes == 2] = 0
    packed = pack_classes(classes, count)
    assert packed.shape == (map_bytes(rows, count),)
    assert packed.dtype == torch.uint8
    unpacked, offsets = places(packed, count, rows)
    assert torch.equal(unpacked.long(), classes)
    for kind in range(count):
        inside = offsets[classes == kind]
        assert torch.equal(inside, torch.arange(len(inside), dtype=torch.int32))


def test_a_banded_lookup_reads_every_class_once_and_only_those_it_meets():
    classes = torch.tensor([2, 0, 2, 2, 0])
    tables = [numbers(2, 3, seed=1).requires_grad_(), numbers(0, 3), numbers(3, 3, seed=2).requires_grad_()]
    whole = torch.stack([tables[2][0], tables[0][0], tables[2][1], tables[2][2], tables[0][1]])
    calls = []

    def reader(kind: int):
        return lambda offsets: calls.append(kind) or tables[kind].index_select(0, offsets)

    readers = [reader(kind) for kind in range(3)]
    where = places(pack_classes(classes, 3), 3, 5)
    for ids in (torch.tensor([[3, 3], [1, 0]]), torch.tensor(4, dtype=torch.int32), torch.tensor([], dtype=torch.long)):
        with torch.no_grad():
            assert torch.equal(banded(ids, *where, readers, 3, torch.float32), whole[ids.long()])
    assert calls == [0, 2, 0]
    banded(torch.tensor([0, 0, 2]), *where, readers, 3, torch.float32).sum().backward()
    assert tables[2].grad.tolist() == [[2.0] * 3, [1.0] * 3, [0.0] * 3]
    assert tables[0].grad.tolist() == [[0.0] * 3] * 2
    for outside in (5, -1):
        with pytest.raises(IndexError):
            banded(torch.tensor([outside]), *where, readers, 3, torch.float32)


# Allocation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_the_optimum_on_the_hull_and_near_it_elsewhere(seed):
    loss = losses(seed)
    choices = torch.cartesian_prod(*[torch.arange(5)] * 8)
    prices, sums = COST[choices].sum(1), sum(loss[row][choices[:, row]] for row in range(8))
    for multiplier in torch.logspace(-6, 0, 25, dtype=torch.float64):
        levels = (loss + multiplier * COST).argmin(1)
        budget = int(COST[levels].sum())
        best = float(sums[prices <= budget].min())
        assert total(loss, levels) == pytest.approx(best, rel=1e-12)
        assert total(loss, allocate(loss, COST, budget)) == pytest.approx(best, rel=1e-12)
    before = torch.inf
    for budget in range(80, 330, 5):
        levels = allocate(loss, COST, budget)
        assert int(COST[levels].sum()) <= budget
        reached, best = total(loss, levels), float(sums[prices <= budget].min())
        one_row = float((loss[:, :1] - loss).amax())
        assert best * (1 - 1e-12) <= reached <= best + one_row
        assert reached <= before
        before = reached


def test_what_remains_is_less_than_any_upgrade_costs():
    loss = losses(3, 200)
    for budget in (2001, 2503, 4004, 7999):
        levels = allocate(loss, COST, budget)
        rest = budget - int(COST[levels].sum())
        useful = (COST[None] > COST[levels, None]) & (loss < loss.gather(1, levels[:, None]))
        assert rest < torch.where(useful, COST[None] - COST[levels, None], 10**6).min()


def test_allocation_moves_with_the_rows_and_is_uniform_for_equal_ones():
    loss, order = losses(5, 300), torch.randperm(300, generator=torch.Generator().manual_seed(0))
    levels = allocate(loss, COST, 5555)
    assert torch.equal(allocate(loss[order], COST, 5555), levels[order])
    equal = torch.tensor([1.0, 0.5, 0.2, 0.1, 0.01], dtype=torch.float64).expand(50, 5)
    for level in range(5):
        assert (allocate(equal, COST, 50 * int(COST[level])) == level).all()
    assert len(allocate(equal, COST, 50 * 25).unique()) <= 3


def test_a_large_vocabulary_takes_seconds():
    start = time.process_time()
    levels = allocate(losses(0, 50_000), COST, 50_000 * 18)
    assert time.process_time() - start < 5
    assert 50_000 * 18 - 4 < int(COST[levels].sum()) <= 50_000 * 18


def test_a_level_that_gains_nothing_is_not_bought():
    flat = torch.tensor([[1.0, 1.0, 0.5, 0.5, 0.5], [0.0] * 5], dtype=torch.float64)
    assert allocate(flat, COST, 1000).tolist() == [2, 0]


# Table ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_the_table_is_within_budget_and_what_was_predicted(knobs):
    site, method = table(), MixedBitEmbedding.parse(knobs)
    part = fitted(knobs, site, numbers(77, 24), seen())
    cost = method.predict(site)
    state = part.state_dict()
    assert cost.bytes == sum(tensor.nbytes for tensor in state.values())
    assert cost.parameters == part.numbers() == 77 * 24
    skeleton = method.build(site, META, torch.float32).state_dict()
    assert {name: tensor.shape for name, tensor in skeleton.items()} == {n: t.shape for n, t in state.items()}
    if knobs["bits"] != "split":
        assert cost.bytes * 8 <= knobs["bits"] * 77 * 24
        assert part.average_bits() == cost.bytes * 8 / (77 * 24) > knobs["bits"] - 8 * 2 / (77 * 24)
        used = sum(len(rows) * layout.row_bytes for rows, layout in zip(part.blocks.rows, part.layouts, strict=True))
        spare = part.weight.nbytes - used
        assert spare >= 0
        if not knobs.get("compensate"):
            assert spare < max(layout.row_bytes for layout in part.layouts)


@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_lookup_and_tied_head_are_those_of_the_merged_table(knobs):
    weight = numbers(77, 24)
    weight[5] = 0
    part = fitted(knobs, table(scale=4.0, padding_row=5, heads=("head",)), weight, seen())
    merged, ids = part.merged(), torch.tensor([[0, 5, 76], [12, 12, 3]], dtype=torch.int32)
    assert torch.equal(part(ids), merged[ids.long()] * 4)
    assert torch.equal(part(ids[0, 2]), part(ids)[0, 2])
    assert part(ids[:, :0]).shape == (2, 0, 24)
    hidden = numbers(2, 3, 24, seed=4)
    torch.testing.assert_close(part.logits(hidden), hidden @ merged.T, rtol=1e-4, atol=1e-4)
    if not knobs.get("compensate"):
        assert part(torch.tensor(5)).abs().max() == 0
        for rows, layout in zip(part.blocks.rows, part.layouts, strict=True):
            if len(rows):
                plain = unpack(pack(weight[rows], layout, clip=True), layout)
                torch.testing.assert_close(merged[rows], plain, rtol=0, atol=1e-6)
    for outside in (77, -1):
        with pytest.raises(IndexError):
            part(torch.tensor([outside]))


def test_important_rows_get_more_bits_and_frequent_ones_weigh_more_in_lookups():
    site, calibration = table(400, 32), seen(400)
    part = fitted({"bits": 4.5}, site, numbers(400, 32), calibration)
    bits = torch.tensor([layout.bits for layout in part.layouts])[part.blocks.classes.long()].double()
    ranks = torch.stack((bits, calibration.sensitivity)).argsort(dim=1).argsort(dim=1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.8
    assert bits[:40].mean() > bits[-100:].mean() + 1
    assert part.average_bits(calibration.frequency) > part.average_bits() + 0.5
    assert part.average_bits(torch.ones(400)) == pytest.approx(part.average_bits(), abs=0.05)


def test_a_larger_budget_never_predicts_more_loss_and_no_table_is_larger_than_it_can_use():
    site, weight, calibration, before = table(200, 32), numbers(200, 32), seen(200), torch.inf
    share = calibration.sensitivity + 0.05
    for bits in (3.2, 3.5, 4.0, 5.0, 6.0, 8.0, 16.0):
        part = fitted({"bits": bits}, site, weight, calibration)
        lost = float((part.merged() - weight).double().square().sum(1) @ share)
        assert lost < before
        before = lost
        if bits == 16.0:
            assert len(part.blocks.rows[-1]) == 200
            assert part.weight.nbytes == 200 * part.layouts[-1].row_bytes
            assert MixedBitEmbedding.parse({"bits": bits}).note(site) == "bits 16 reduced to 10.09: every row has 8"


def test_equal_importance_of_equal_rows_is_a_uniform_table():
    site = table(60, 32)
    four = RowFormat(4, 32, 32).row_bytes
    bits = (60 * four + map_bytes(60, 5)) * 8 / (60 * 32)
    part = fitted({"bits": bits, "importance": "none"}, site, numbers(1, 32).expand(60, 32), Calibration())
    assert len(part.blocks.rows[2]) == 60


def test_the_split_has_exactly_the_often_described_average():
    site = table(1000, 64)
    calibration = Calibration(frequency=torch.arange(1000.0).double())
    part = fitted({"bits": "split", "importance": "frequency"}, site, numbers(1000, 64), calibration)
    sizes = {layout.bits: len(rows) for layout, rows in zip(part.layouts, part.blocks.rows, strict=True)}
    assert sizes == {4: 700, 8: 300}
    assert sum(bits * count for bits, count in sizes.items()) / 1000 == 5.2
    assert "5.866 stored bits" in MixedBitEmbedding.parse({"bits": "split"}).note(site)
    assert part.average_bits() == pytest.approx(5.2 + (700 * 4 + 300 * 8 + 125) * 8 / (1000 * 64), rel=1e-12)


def test_permuted_rows_give_permuted_bits():
    site, weight, calibration = table(), numbers(77, 24), seen()
    order = torch.randperm(77, generator=torch.Generator().manual_seed(3))
    moved = Calibration(frequency=calibration.frequency[order], sensitivity=calibration.sensitivity[order])
    part, other = fitted({"bits": 5.5}, site, weight, calibration), fitted({"bits": 5.5}, site, weight[order], moved)
    assert torch.equal(other.merged(), part.merged()[order])


def test_state_survives_saving_loading_casting_and_copying():
    site = table()
    method = MixedBitEmbedding.parse({"bits": 5.5})
    part, other = (fitted({"bits": 5.5}, site, numbers(77, 24, seed=s), seen(seed=s + 1)) for s in (0, 9))
    ids, merged = torch.arange(77), part.merged()
    assert not torch.equal(part.classes, other.classes)
    other(ids)
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    state = torch.load(file)
    # Load into a part that already looked up rows, and into an empty skeleton.
    other.load_state_dict(state)
    skeleton = method.build(site, META, torch.float32)
    skeleton.load_state_dict(state, assign=True)
    twin = copy.deepcopy(part)
    for one in (other, skeleton, twin):
        assert torch.equal(one(ids), merged)
    with torch.inference_mode():
        assert torch.equal(other.half()(ids), merged.half())
    assert torch.equal(other.float()(ids), merged)
    part.weight.zero_()
    part.classes.zero_()
    assert torch.equal(twin(ids), merged)
    assert not torch.equal(part(ids), merged)


@pytest.mark.parametrize("knobs", SETTINGS, ids=str)
def test_unpacking_and_repacking_changes_nothing_and_training_in_between_helps(knobs):
    site, weight, calibration = table(padding_row=5), numbers(77, 24), seen()
    part = fitted(knobs, site, weight, calibration)
    ids, before, names = torch.arange(77), part.merged(), list(part.state_dict())
    part.unpack(weight)
    torch.testing.assert_close(part(ids), before, rtol=0, atol=1e-5)
    hidden = numbers(3, 24, seed=2)
    torch.testing.assert_close(part.logits(hidden), hidden @ before.T, rtol=1e-4, atol=1e-4)
    part.repack()
    torch.testing.assert_close(part.merged(), before, rtol=0, atol=1e-5)
    assert list(part.state_dict()) == names

    target = weight + 0.5 * numbers(77, 24, seed=8)
    part.unpack()
    optimiser = torch.optim.Adam(part.parameters(), lr=0.05)
    start = (part(ids) - target).square().sum().item()
    for _ in range(20):
        optimiser.zero_grad()
        (part(ids) - target).square().sum().backward()
        assert part.weight_unpacked.grad[5].abs().max() == 0
        optimiser.step()
    unpacked = part(ids).detach()
    part.repack()
    torch.testing.assert_close(part(ids), unpacked, rtol=0, atol=1e-5)
    assert (part(ids) - target).square().sum().item() < 0.6 * start


def test_compensation_points_at_the_best_row_and_only_helps():
    residual, dictionary = numbers(50, 16), numbers(30, 16, seed=1)
    rows, coefficients = match(residual, dictionary)
    cosines = residual @ (dictionary / dictionary.norm(dim=1, keepdim=True)).T
    assert torch.equal(rows, cosines.square().argmax(1))
    left = residual - coefficients[:, None] * dictionary[rows]
    torch.testing.assert_close((left * dictionary[rows]).sum(1), torch.zeros(50), rtol=0, atol=1e-4)
    records, scale = pack_records(rows + 40_000, coefficients)
    again, rounded = unpack_records(records, scale)
    assert torch.equal(again, rows + 40_000)
    assert (rounded - coefficients).abs().max() <= coefficients.abs().max() / 254 * 1.001
    site, weight = table(200, 24), numbers(200, 24)
    part = fitted({"bits": 7.5, "compensate": True, "choices": [3, 8]}, site, weight, seen(200))
    plain = torch.empty_like(weight)
    for kind, rows in enumerate(part.blocks.rows):
        plain[rows] = unpack(pack(weight[rows], part.layouts[kind], clip=True), part.layouts[kind])
    assert len(part.blocks.rows[-1]) > 10
    error, without = (part.merged() - weight).square().sum(1), (plain - weight).square().sum(1)
    assert error.sum() < 0.95 * without.sum()


def test_from_scratch_is_sound():
    torch.manual_seed(0)
    part = MixedBitEmbedding.parse({"bits": 4.5}).build(table(2000, 64, padding_row=0), CPU, torch.float32)
    assert part.merged().std().item() == pytest.approx(0.02, rel=0.05)
    assert part(torch.tensor(0)).abs().max() == 0


def test_keep_is_kept_and_monotone():
    site, before = table(500, 64), 0
    for keep in (0.08, 0.1, 0.15, 0.2, 0.5, 1.0):
        method = MixedBitEmbedding.parse({}, keep).solve(site, keep)
        assert method.fits(site) is None
        assert before <= method.predict(site).bytes <= keep * site.dense().bytes
        before = method.predict(site).bytes
    assert before == 500 * RowFormat(8, 64, 64).row_bytes + map_bytes(500, 5)


def test_wrong_input_is_refused_with_the_reason():
    site, weight, calibration = table(), numbers(77, 24), seen()
    assert "not a token table" in MixedBitEmbedding.parse({"bits": 4.0}).fits(
        LinearSite(slot="projection", path="q", inputs=4, outputs=4)
    )
    # 2-bit rows of 24 take 6 bytes and 4 of scale and bias, the map 3 bits a row.
    reason = MixedBitEmbedding.parse({"bits": 3.4}).fits(site)
    assert "3.459" in reason
    assert MixedBitEmbedding.parse({"bits": 3.46}).fits(site) is None
    with pytest.raises(TautError, match=r"least is 0\.1081"):
        MixedBitEmbedding.parse({}, 0.1).solve(site, 0.1)
    for knobs, text in (
        ({}, "give keep or bits"),
        ({"bits": 0}, "bits"),
        ({"bits": "halves"}, "bits"),
        ({"bits": 4, "choices": [5]}, "choices"),
        ({"bits": 4, "choices": []}, "choices"),
        ({"bits": 4, "importance": "length"}, "importance"),
        ({"bit": 4}, "did you mean 'bits'"),
    ):
        with pytest.raises(TautError, match=text):
            MixedBitEmbedding.parse(knobs)
    part = fitted({"bits": 5.0, "importance": "none"}, site, weight, Calibration())
    for importance in ("sensitivity", "gradient", "frequency"):
        method = MixedBitEmbedding.parse({"bits": 5.0, "importance": importance})
        assert method.needs == {"frequency", importance}
        with pytest.raises(TautError, match=f"importance: {importance} needs calibration text"):
            method.fit(part, weight, Calibration())
        few = torch.zeros(77, dtype=torch.float64)
        few[:12] = 1
        with pytest.raises(TautError, match="12 tokens of calibration text are too few for 77 rows; give at least 19"):
            method.fit(part, weight, Calibration(frequency=few, gradient=few, sensitivity=few))
    assert not MixedBitEmbedding.parse({"bits": 5.0, "importance": "none"}).needs
    with pytest.raises(TautError, match="not finite"):
        MixedBitEmbedding.parse({"bits": 5.0}).fit(part, weight / 0, calibration)
