"""Matryoshka tables: every prefix of the columns is the best table of its width, and can be used at run time."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.core.site import TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.matryoshka import MatryoshkaEmbedding

CPU = torch.device("cpu")
STORES = [None, {"bits": 8}, {"bits": 4, "group": 4}]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def table(rows: int = 60, width: int = 16, **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", dtype="float64", rows=rows, width=width, **fields)


def built(site: TableSite, **knobs):
    return MatryoshkaEmbedding.parse(knobs).build(site, CPU, torch.float64)


def fitted(site: TableSite, weight: Tensor, calibration: Calibration | None = None, **knobs):
    method = MatryoshkaEmbedding.parse({"weighted": False, **knobs})
    part = method.build(site, CPU, torch.float64)
    method.fit(part, weight, calibration or Calibration())
    return part


def test_at_full_width_it_is_the_table():
    weight = matrix(60, 16)
    torch.testing.assert_close(fitted(table(), weight, width=16).merged(), weight, rtol=0, atol=1e-10)


def test_every_prefix_is_the_truncated_singular_value_decomposition():
    weight = matrix(60, 16)
    part = fitted(table(), weight, width=12, prefixes=[0.25, 0.5, 1.0])
    assert part.widths == (3, 6, 12)
    for width in part.widths:
        part.use(width)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        best = left[:, :width] * values[:width] @ right[:width]
        torch.testing.assert_close(part.merged(), best, rtol=0, atol=1e-9)


def test_weighted_prefixes_are_the_best_for_the_weighted_rows():
    weight, frequency = matrix(60, 16), matrix(60, seed=1).square() * 50
    part = fitted(table(), weight, Calibration(frequency=frequency), width=12, weighted=True)
    root = (frequency + 1).sqrt()[:, None]
    for width in part.widths:
        part.use(width)
        discarded = torch.linalg.svdvals(root * weight)[width:].square().sum()
        torch.testing.assert_close((root * (weight - part.merged())).square().sum(), discarded, rtol=1e-9, atol=0)


@pytest.mark.parametrize("store", STORES)
def test_a_shorter_prefix_changes_the_answer_and_nothing_stored(store):
    site, weight = table(scale=4.0, heads=("head",)), matrix(60, 16)
    part = fitted(site, weight, width=12, store=store)
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    ids, hidden = torch.tensor([[0, 3, 59], [7, 7, 1]]), matrix(2, 3, 16, seed=5)
    whole, errors = part(ids), []
    for width in part.widths:
        part.use(width)
        dense = part.merged()
        assert torch.linalg.matrix_rank(dense, rtol=1e-9) == width
        torch.testing.assert_close(part(ids), dense[ids] * 4.0, rtol=0, atol=1e-5)
        torch.testing.assert_close(part.logits(hidden), hidden @ dense.T, rtol=0, atol=1e-10)
        errors.append((dense.detach() - weight).square().sum().item())
    assert all(wide < narrow for narrow, wide in pairwise(errors))
    assert torch.equal(part(ids), whole)
    assert all(torch.equal(tensor, before[name]) for name, tensor in part.state_dict().items())


def test_a_prefix_reads_no_column_behind_it():
    part = fitted(table(), matrix(60, 16), width=12)
    part.use(3)
    before = part(torch.arange(60)).detach(), part.logits(matrix(4, 16)).detach()
    with torch.no_grad():
        part.band_1.fill_(torch.nan)
        part.band_2.fill_(torch.nan)
    assert torch.equal(part(torch.arange(60)), before[0])
    assert torch.equal(part.logits(matrix(4, 16)), before[1])


def test_in_nested_training_a_call_uses_one_prefix_and_its_head_the_same():
    weight, ids, hidden = matrix(60, 16), torch.arange(60), matrix(4, 16, seed=3)
    part = fitted(table(heads=("head",)), weight, width=12, nested=True)
    dense = {}
    for width in part.widths:
        part.use(width)
        dense[width] = part.merged().detach()
    twin = copy.deepcopy(part).train()
    part.train()
    seen = []
    for _ in range(40):
        vectors, scores = part(ids), part.logits(hidden)
        (width,) = [width for width, rows in dense.items() if torch.allclose(vectors, rows, atol=1e-10)]
        torch.testing.assert_close(scores, hidden @ dense[width].T, rtol=0, atol=1e-10)
        assert torch.equal(twin(ids), vectors)
        seen.append(width)
    assert all(seen.count(width) > 5 for width in part.widths)
    part.eval()
    torch.testing.assert_close(part(ids), dense[12], rtol=0, atol=1e-10)


def test_every_parameter_gets_a_gradient_whatever_prefix_is_drawn():
    part = fitted(table(padding_row=3), matrix(60, 16), width=12, nested=True).train()
    for _ in range(6):
        part.zero_grad(set_to_none=True)
        (part(torch.arange(60)).sum() + part.logits(matrix(2, 16)).sum()).backward()
        assert all(parameter.grad.isfinite().all() for parameter in part.parameters())
    part.zero_grad()
    part(torch.tensor([3, 4])).square().sum().backward()
    assert not part.weight.grad[3].any()
    assert part.weight.grad[4].any()


def test_nested_training_puts_the_most_into_the_first_columns():
    """Two tables learn to imitate a third. Cut to a quarter, the one trained with nested prefixes is far closer."""
    target, ids, left = matrix(60, 16), torch.arange(60), {}
    for nested in (False, True):
        torch.manual_seed(0)
        part = built(table(), width=12, nested=nested).train()
        optimiser = torch.optim.Adam(part.parameters(), lr=0.02)
        for _ in range(400):
            optimiser.zero_grad()
            (part(ids) - target).square().mean().backward()
            optimiser.step()
        part.eval().use(3)
        left[nested] = float((part(ids) - target).square().mean().detach())
    best = float(torch.linalg.svdvals(target)[3:].square().sum() / target.numel())
    assert best < left[True] < 1.1 * best
    assert left[False] > 1.2 * left[True]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("prefixes", [[1.0], [0.3, 0.7, 1.0]])
def test_the_account_is_exact(store, prefixes):
    site = table(heads=("head",))
    method = MatryoshkaEmbedding.parse({"width": 11, "prefixes": prefixes, "store": store})
    part, cost = method.build(site, CPU, torch.float64), method.predict(site)
    assert cost.bytes == sum(tensor.nbytes for tensor in part.state_dict().values())
    assert cost.parameters == part.numbers() == 11 * (60 + 16)
    assert cost.flops_per_token == 2 * 11 * 16 + 2 * 11 * (60 + 16)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("keep", [0.06, 0.2, 0.6])
def test_keep_buys_the_greatest_width(store, keep):
    site = table(400, 32)
    knobs = {"store": store}
    method = MatryoshkaEmbedding.parse(knobs, keep=keep).solve(site, keep)
    assert method.fits(site) is None
    assert method.predict(site).bytes <= keep * site.dense().bytes
    wider = MatryoshkaEmbedding.parse({"width": method.width + 1, **knobs})
    assert wider.fits(site) is not None or wider.predict(site).bytes > keep * site.dense().bytes


@pytest.mark.parametrize("store", STORES[1:])
def test_unpacked_it_computes_what_it_will_once_repacked_and_training_helps(store):
    weight, ids = matrix(60, 16), torch.arange(60)
    part = fitted(table(), weight, width=12, store=store)
    names = {name: (t.shape, t.dtype) for name, t in part.state_dict().items()}
    part.unpack(weight)
    unpacked = part(ids).detach()
    part.repack()
    torch.testing.assert_close(part(ids), unpacked, rtol=0, atol=1e-4)
    assert {name: (t.shape, t.dtype) for name, t in part.state_dict().items()} == names
    target = weight + 0.5 * matrix(60, 16, seed=8)
    start = (part(ids) - target).square().sum()
    part.unpack(weight)
    optimiser = torch.optim.Adam(part.parameters(), lr=0.02)
    for _ in range(40):
        optimiser.zero_grad()
        (part(ids) - target).square().sum().backward()
        optimiser.step()
    part.repack()
    assert (part(ids) - target).square().sum() < 0.9 * start


def test_from_scratch_entries_have_the_usual_deviation_and_padding_is_zero():
    torch.manual_seed(0)
    dense = built(table(2000, 32, padding_row=5), width=12).merged().detach()
    assert float(dense.std()) == pytest.approx(0.02, rel=0.05)
    assert not dense[5].any()


def test_wrong_input_is_one_clear_line():
    site, part = table(), fitted(table(), matrix(60, 16), width=12)
    with pytest.raises(TautError, match=r"width 5 is not a prefix of this table \[3, 6, 12\]; the nearest is 6"):
        part.use(5)
    assert "give at most 12" in MatryoshkaEmbedding.parse({"width": 13}).fits(site)
    assert MatryoshkaEmbedding.parse({"width": 12}).fits(site) is None
    for wrong in ([], [0.5], [0.5, 0.5, 1.0], [0.0, 1.0], [0.5, 1.5]):
        with pytest.raises(TautError, match="prefixes = .*expected ascending shares"):
            MatryoshkaEmbedding.parse({"width": 12, "prefixes": wrong})
    with pytest.raises(TautError, match="leaves no width at embedding .* the least is"):
        MatryoshkaEmbedding.parse({}, keep=0.01).solve(site, 0.01)
    with pytest.raises(TautError, match="weighted needs token frequencies"):
        fitted(site, matrix(60, 16), width=12, weighted=True)
    with pytest.raises(IndexError):
        part(torch.tensor([60]))
