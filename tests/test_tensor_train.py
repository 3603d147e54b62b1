"""Tensor-train tables: what is stored leads back to every row, and costs what was predicted."""

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from trains import ROWS, WIDTH, counts, fitted, matrix, method, site

from taut.core.errors import TautError
from taut.methods.base import Calibration
from taut.methods.embedding.tensor_train.bit_packing import read_integers
from taut.methods.embedding.tensor_train.fit import principal_order, row_factors
from taut.methods.embedding.tensor_train.kernel import TrainShape, expand
from taut.methods.embedding.tensor_train.method import STANDARD_DEVIATION

CPU = torch.device("cpu")


def test_weighting_helps_the_frequent_rows_at_the_expense_of_others():
    weight, calibration = matrix(ROWS, WIDTH), counts()
    share = calibration.frequency + 1

    def error(**knobs) -> tuple[float, float]:
        gap = (fitted(method(rank=3, **knobs), site(), weight).merged() - weight).square().sum(1)
        return gap.sum().item(), (gap * share).sum().item()

    (plain, plain_weighted), (weighted, weighted_weighted) = error(), error(weighted=1.0)
    assert plain < weighted
    assert weighted_weighted < 0.9 * plain_weighted


@pytest.mark.parametrize("arrange", ["given", "frequency", "principal"])
@pytest.mark.parametrize("hot", [0, 6])
def test_stored_order_and_hot_rows_lead_back_to_every_row(arrange, hot):
    weight, calibration = matrix(ROWS, WIDTH), counts()
    way = method(rank=10**6, row_factors=(3, 4, 5), column_factors=(2, 3, 4), arrange=arrange, hot=hot)
    part = fitted(way, site(scale=2.0, heads=("head",)), weight, calibration)
    torch.testing.assert_close(part.merged(), weight, rtol=0, atol=1e-9)
    ids = torch.randint(ROWS, (3, 50), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(part(ids), 2 * weight[ids], rtol=0, atol=1e-9)
    torch.testing.assert_close(part(ids[:1, :4].int()), 2 * weight[ids[:1, :4]], rtol=0, atol=1e-9)
    hidden = matrix(2, 5, WIDTH, seed=8)
    torch.testing.assert_close(part.logits(hidden), F.linear(hidden, weight), rtol=0, atol=1e-8)
    slots = part.slots(torch.arange(ROWS))
    frequent = calibration.frequency.argsort(descending=True, stable=True)[:hot]
    assert sorted((slots < hot).nonzero().squeeze(1).tolist()) == sorted(frequent.tolist())
    assert len(set(slots.tolist())) == ROWS


def test_whole_columns_are_a_low_rank_table_whose_narrow_factor_is_a_train():
    place, weight = site(), matrix(ROWS, WIDTH)
    part = fitted(method(rank=(100, 5), columns="whole", sweeps=0), place, weight)
    assert part.shape == TrainShape((*row_factors(ROWS, 2), 1), (1, 1, WIDTH), (part.shape.rows[0], 5))
    # With the rows' rank uncut, the best approximation of rank 5 and nothing else is lost.
    best = torch.linalg.svdvals(weight)[5:].square().sum()
    torch.testing.assert_close((part.merged() - weight).square().sum(), best)
    message = method(rank=3, columns="whole", column_factors=(2, 3, 4)).fits(place)
    assert "columns: whole sets the factors itself" in message


def test_order_of_a_permuted_vocabulary_gives_the_same_rows():
    weight = matrix(ROWS, WIDTH)
    shuffle = torch.randperm(ROWS, generator=torch.Generator().manual_seed(3))
    way = method(rank=4, arrange="principal", sweeps=0)
    one, other = fitted(way, site(), weight), fitted(way, site(), weight[shuffle])
    torch.testing.assert_close(other.merged(), one.merged()[shuffle], rtol=0, atol=1e-5)


def test_principal_order_puts_alike_rows_in_one_block():
    centres = torch.tensor([-3.0, -1.0, 1.0, 3.0]).repeat_interleave(6)[:, None] * matrix(1, 8, dtype=torch.float32)
    shuffle = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    table = (centres + 0.05 * matrix(24, 8, seed=2, dtype=torch.float32))[shuffle]
    order = principal_order(table, (4, 2, 3), torch.empty(0, dtype=torch.long))
    assert sorted(order.tolist()) == list(range(24))
    assert [len(set((shuffle[block] // 6).tolist())) for block in order.view(4, 6)] == [1, 1, 1, 1]
    first = torch.tensor([5, 3])
    order = principal_order(table, (4, 2, 4), first)
    assert order[:2].tolist() == [5, 3]
    assert sorted(order.tolist()) == list(range(24))


def test_hot_rows_are_kept_to_the_bit_and_refreshed_from_the_cores():
    weight, calibration = matrix(ROWS, WIDTH), counts()
    frequent = calibration.frequency.argsort(descending=True, stable=True)[:6]
    for arrange in ("given", "principal"):
        part = fitted(method(rank=3, hot=6, arrange=arrange), site(), weight, calibration)
        assert torch.equal(part(frequent), weight[frequent])
        cold = expand(part._cores())
        part.refresh()
        positions = part._hot_positions()
        torch.testing.assert_close(part.hot_rows, cold[positions], rtol=0, atol=1e-12)
        every = torch.arange(ROWS)
        without = cold[:ROWS] if arrange == "given" else cold[read_integers(part.places, every, part.bits)]
        torch.testing.assert_close(part(every), without, rtol=0, atol=1e-12)


def test_hot_rows_do_not_weigh_on_the_cores():
    weight, calibration = matrix(ROWS, WIDTH), counts()
    frequent = calibration.frequency.argsort(descending=True, stable=True)[:6]
    other = weight.clone()
    other[frequent] *= 1000
    parts = [fitted(method(rank=3, hot=6, arrange="principal"), site(), one, calibration) for one in (weight, other)]
    for name in parts[0].names:
        assert torch.equal(parts[0].get_parameter(name), parts[1].get_parameter(name))


@pytest.mark.parametrize("rank", [32, 64])
def test_start_from_scratch_has_the_promised_deviation(rank):
    torch.manual_seed(0)
    part = method(rank=rank, hot=10).build(site(10_000, 128, "float32"), CPU, torch.float32)
    assert abs(part.merged().std().item() / STANDARD_DEVIATION - 1) < 0.03
    torch.testing.assert_close(part(torch.arange(20)), expand(part._cores())[:20], rtol=0, atol=1e-6)


@pytest.mark.parametrize("knobs", [{"hot": 4, "arrange": "frequency"}, {"columns": "whole"}])
def test_a_vector_does_not_depend_on_the_rest_of_its_batch(knobs):
    part = fitted(method(rank=5, **knobs), site(dtype="float32"), matrix(ROWS, WIDTH).float())
    ids = torch.randint(ROWS, (4, 100), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[:, 60:] = (changed[:, 60:] + 11) % ROWS
    whole = part(ids)
    assert torch.equal(whole[:, :60], part(changed)[:, :60])
    for length in (1, 7, 63, 64, 65):
        assert torch.equal(part(ids[0, :length]), whole[0, :length])
    assert torch.equal(part(ids.int()), whole)
    assert part(ids[:0]).shape == (0, 100, WIDTH)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, Tensor) and not function.is_view:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("store", [None, {"bits": 4}])
def test_neither_lookup_nor_head_nor_gradient_ever_holds_the_table(store):
    place = site(20_000, 64, "float32", heads=("head",))
    part = method(rank=4, hot=20, arrange="principal", store=store).build(place, CPU, torch.float32)
    ids = torch.randint(20_000, (100,), generator=torch.Generator().manual_seed(0))
    with Largest() as lookup:
        rows = part(ids)
    assert lookup.numbers <= 2 * len(ids) * 64 + part.weight.numel()
    hidden = matrix(2, 64, dtype=torch.float32).requires_grad_()
    for ways in (1, 500):
        with Largest() as head:
            part.logits(hidden[:1].expand(ways, 64)).sum().backward()
        assert head.numbers <= ways * 20_020 + 20_000 * 64 / 8
    if store is None:
        with Largest() as gradient:
            rows.sum().backward()
        assert gradient.numbers <= 4 * len(ids) * 64


def test_padding_sends_no_gradient():
    weight = matrix(ROWS, WIDTH)
    part = fitted(method(rank=4, hot=5, arrange="frequency"), site(padding_row=7), weight)
    ids = torch.tensor([[7, 3, 3], [20, 7, 7]])
    part(ids).sum().backward()
    alone = [parameter.grad.clone() for parameter in part.parameters()]
    part.zero_grad()
    part(torch.tensor([3, 3, 20])).sum().backward()
    for mine, other in zip(alone, part.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "knobs",
    [
        {"rank": 4},
        {"rank": (3, 6), "hot": 5},
        {"rank": 4, "arrange": "frequency", "hot": 3},
        {"rank": 5, "order": 2, "arrange": "principal"},
        {"rank": 4, "order": 4, "hot": 2, "store": {"bits": 4, "group": 8}},
    ],
)
def test_predicted_cost_is_what_the_part_holds(knobs):
    place = site(heads=("head",))
    way = method(**knobs)
    part, cost = fitted(way, place, matrix(ROWS, WIDTH)), way.predict(place)
    assert cost.parameters == part.numbers()
    assert cost.bytes == sum(tensor.nbytes for tensor in part.state_dict().values())
    assert part.weight.dim() == 3


@pytest.mark.parametrize("hot", [0, 4])
def test_packed_cores_are_unpacked_trained_and_repacked(hot):
    way = method(rank=6, hot=hot, store={"bits": 4, "group": 8})
    weight = matrix(ROWS, WIDTH, dtype=torch.float32)
    part = fitted(way, site(dtype="float32"), weight)
    before, other = part.merged(), matrix(ROWS, WIDTH, seed=3, dtype=torch.float32)
    names = {name: tensor.shape for name, tensor in part.state_dict().items()}
    part.unpack(weight)
    every = torch.arange(ROWS)
    torch.testing.assert_close(part(every), before, rtol=0, atol=1e-4)
    first = F.mse_loss(part(every), other)
    adam = torch.optim.Adam(part.parameters(), 0.02)
    for _ in range(20):
        adam.zero_grad()
        F.mse_loss(part(every), other).backward()
        adam.step()
    unpacked = part(every).detach()
    part.repack()
    assert {name: tensor.shape for name, tensor in part.state_dict().items()} == names
    torch.testing.assert_close(part(every), unpacked, rtol=0, atol=1e-4)
    assert F.mse_loss(part(every), other) < 0.95 * first


def test_keep_is_the_greatest_rank_within_the_budget():
    place = site(2000, 64, "float32")
    for keep in (0.05, 0.3, 1.0):
        way = method(rank=1, hot=10, arrange="principal").solve(place, keep)
        more = type(way)(way.knobs.model_copy(update={"rank": way.knobs.rank + 1}))
        assert way.predict(place).bytes <= keep * place.dense().bytes < more.predict(place).bytes
    with pytest.raises(TautError, match=r"keep = 0.001 leaves no rank at embedding \(2000 x 64\): the least is"):
        method(rank=1).solve(place, 0.001)


@pytest.mark.parametrize(
    ("knobs", "reason"),
    [
        ({"rank": 4, "row_factors": (3, 4, 4)}, r"row_factors \[3, 4, 4\] make 48; .* at least 57, such as \[.*\]"),
        ({"rank": 4, "column_factors": (2, 3, 5)}, r"column_factors \[2, 3, 5\] make 30; .* exactly 24, such as"),
        ({"rank": 4, "row_factors": (8, 8), "column_factors": (2, 3, 4)}, "expected 2 factors"),
        ({"rank": (4, 4, 4)}, r"rank \[4, 4, 4\]: 3 cores need 2 ranks of at least 1"),
        ({"rank": 0}, r"rank \[0, 0\]: 3 cores need 2 ranks of at least 1"),
        ({"rank": 10**6}, "do not reduce"),
        ({"rank": 1, "hot": 57}, "do not reduce"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(knobs, reason):
    message = method(**knobs).fits(site())
    assert re.search(reason, message), message
    assert "\n" not in message


def test_wrong_input_is_refused_in_one_line():
    weight = matrix(ROWS, WIDTH)
    way = method(rank=3, hot=4)
    part = way.build(site(), CPU, torch.float64)
    with pytest.raises(TautError, match="need token counts; give calibration text"):
        way.fit(part, weight, Calibration())
    part = fitted(method(rank=3), site(), weight)
    for wrong in (ROWS, 59, -1):
        with pytest.raises(IndexError, match=f"token id {wrong} is out of range: the table has {ROWS} rows"):
            part(torch.tensor([0, wrong]))
    with pytest.raises(TautError, match="give keep or rank"):
        method()


def test_note_tells_what_was_cut_and_how_the_head_is_computed():
    note = method(rank=100, row_factors=(3, 4, 5), column_factors=(2, 3, 4)).note(site(heads=("head",)))
    assert "ranks 6, 20; 100, 100 requested" in note
    assert "tied head" in note
    large = site(30_522, 768, "float32", heads=("head",))
    other = method(rank=32, row_factors=(25, 30, 42), column_factors=(8, 8, 12)).note(large)
    assert "rows computed once per call of 13 or more tokens" in other
    assert "contracted core by core" in method(rank=8).note(large)
    assert "tied" not in method(rank=8).note(site(30_522, 768, "float32"))
