"""The low-rank methods: the algebra they promise, in double precision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError
from taut.core.site import LinearSite, TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.low_rank import LowRankEmbedding
from taut.methods.linear.low_rank import DAMPING, LowRankLinear
from taut.ops.factors.svd import truncated_svd

CPU = torch.device("cpu")
NOTHING = Calibration()
SHAPES = [(12, 30), (30, 12), (16, 16)]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(width: int, tokens: int = 200, seed: int = 1) -> Tensor:
    """Of strongly correlated inputs; singular when there are fewer tokens than dimensions."""
    inputs = matrix(tokens, width, seed=seed) @ (matrix(width, width, seed=seed + 1) / torch.arange(1.0, width + 1))
    return inputs.T @ inputs / tokens


def line(outputs: int, inputs: int, bias: bool = True) -> LinearSite:
    return LinearSite(
        slot="feedforward", path="a.b", layer=0, role="up", dtype="float64", inputs=inputs, outputs=outputs, bias=bias
    )


def table(rows: int = 50, width: int = 16, **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", dtype="float64", rows=rows, width=width, **fields)


def fitted(method, site, weight: Tensor, calibration: Calibration = NOTHING):
    part = method.build(site, CPU, torch.float64)
    method.fit(part, weight, calibration)
    return part


def linear(rank: int | None, **knobs) -> LowRankLinear:
    return LowRankLinear.parse({"rank": rank, **knobs} if rank else knobs)


def error(part, weight: Tensor, inputs_gram: Tensor) -> float:
    """E ||(W - U V) x||^2."""
    gap = weight - part.merged()
    return torch.trace(gap @ inputs_gram @ gap.T).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 11])
def test_truncation_loses_exactly_the_discarded_singular_values(shape, rank):
    weight = matrix(*shape)
    part = fitted(linear(rank), line(*shape), weight)
    discarded = torch.linalg.svdvals(weight)[rank:].square().sum()
    torch.testing.assert_close((weight - part.merged()).square().sum(), discarded, rtol=1e-10, atol=1e-12)
    left, values, right = truncated_svd(weight, rank)
    torch.testing.assert_close(values, torch.linalg.svdvals(weight)[:rank], rtol=1e-9, atol=0)
    torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(right @ right.T, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("aware", [False, True])
def test_factors_are_balanced(shape, aware):
    calibration = Calibration(gram=gram(shape[1])) if aware else Calibration()
    part = fitted(linear(4), line(*shape), matrix(*shape), calibration)
    left, right = part.weight @ part.weight.T, part.projection @ part.projection.T
    torch.testing.assert_close(left, right, rtol=0, atol=1e-9)
    torch.testing.assert_close(left, torch.diag(left.diagonal()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [200, 6])
def test_activation_aware_fit_is_optimal_and_never_worse_than_plain_on_its_inputs(shape, tokens):
    weight, seen = matrix(*shape), gram(shape[1], tokens)
    plain = fitted(linear(4, activation_aware=False), line(*shape), weight, Calibration(gram=seen))
    aware = fitted(linear(4), line(*shape), weight, Calibration(gram=seen))
    assert error(aware, weight, seen) < 0.9 * error(plain, weight, seen)
    damped = seen + DAMPING * seen.diagonal().mean() * torch.eye(shape[1], dtype=torch.float64)
    optimum = torch.linalg.svdvals(weight @ torch.linalg.cholesky(damped))[4:].square().sum().item()
    assert error(aware, weight, damped) == pytest.approx(optimum, rel=1e-8)


def test_uncorrelated_inputs_give_the_plain_fit_and_no_calibration_falls_back_to_it():
    weight, site = matrix(12, 30), line(12, 30)
    plain = fitted(linear(4, activation_aware=False), site, weight, Calibration(gram=gram(30))).merged()
    white = Calibration(gram=torch.eye(30, dtype=torch.float64))
    torch.testing.assert_close(fitted(linear(4), site, weight, white).merged(), plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(fitted(linear(4), site, weight).merged(), plain, rtol=0, atol=0)


def test_a_map_of_low_rank_is_reproduced_even_when_more_rank_is_offered():
    weight = matrix(12, 3) @ matrix(3, 30)
    for calibration in (Calibration(), Calibration(gram=gram(30))):
        part = fitted(linear(8), line(12, 30), weight, calibration)
        torch.testing.assert_close(part.merged(), weight, rtol=0, atol=1e-9)
        assert part.weight.isfinite().all()


def test_rank_just_below_the_width_loses_only_the_smallest_singular_value():
    weight = matrix(50, 16)
    part = fitted(LowRankEmbedding.parse({"rank": 15}), table(), weight)
    smallest = torch.linalg.svdvals(weight)[-1].square()
    torch.testing.assert_close((weight - part.merged()).square().sum(), smallest, rtol=1e-9, atol=0)


def test_the_same_weight_gives_the_same_bits_and_the_largest_entry_is_positive():
    weight = matrix(40, 24)
    first, second = (fitted(linear(6), line(40, 24), weight) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.projection, second.projection)
    rows = first.projection
    assert (rows.gather(1, rows.abs().argmax(1, keepdim=True)) > 0).all()
    mirrored = fitted(linear(6), line(40, 24), -weight)
    torch.testing.assert_close(mirrored.projection, first.projection)


def test_linear_forward_is_the_merged_map_with_its_bias():
    part = fitted(linear(5), line(12, 30), matrix(12, 30))
    part.bias.data.copy_(matrix(12, seed=3))
    x = matrix(2, 3, 30, seed=4)
    torch.testing.assert_close(part(x), F.linear(x, part.merged(), part.bias), rtol=0, atol=1e-10)


def test_table_lookup_and_tied_head_are_those_of_the_merged_table():
    site = table(scale=4.0, padding_row=3, heads=("head",))
    weight = matrix(50, 16)
    weight[3] = 0
    part = fitted(LowRankEmbedding.parse({"rank": 5}), site, weight)
    ids, hidden = torch.tensor([[0, 3, 49], [7, 7, 1]]), matrix(2, 3, 16, seed=5)
    torch.testing.assert_close(part(ids), part.merged()[ids] * 4.0, rtol=0, atol=1e-12)
    torch.testing.assert_close(part.logits(hidden), hidden @ part.merged().T, rtol=0, atol=1e-12)
    assert part(torch.tensor(3)).abs().max() == 0
    part(ids).sum().backward()
    assert part.weight.grad[3].abs().max() == 0
    assert part.weight.grad[7].abs().max() > 0


def test_weighted_table_minimises_the_weighted_error():
    weight = matrix(50, 16)
    frequency = torch.arange(50.0, dtype=torch.float64).square()
    share = (frequency + 1)[:, None]
    plain = fitted(LowRankEmbedding.parse({"rank": 5}), table(), weight)
    method = LowRankEmbedding.parse({"rank": 5, "weighted": True})
    part = fitted(method, table(), weight, Calibration(frequency=frequency))
    lost, lost_by_plain = (((weight - one.merged()).square() * share).sum().item() for one in (part, plain))
    optimum = torch.linalg.svdvals(weight * share.sqrt())[5:].square().sum().item()
    assert lost == pytest.approx(optimum, rel=1e-9)
    assert lost < 0.99 * lost_by_plain
    with pytest.raises(TautError, match="frequencies"):
        method.fit(part, weight, Calibration())
    assert method.needs == {"frequency"}
    assert not LowRankEmbedding.parse({"rank": 5}).needs


def test_gradients_agree_with_finite_differences():
    part = fitted(linear(3), line(5, 7), matrix(5, 7))
    assert torch.autograd.gradcheck(part, matrix(2, 7, seed=6).requires_grad_())
    lookup = fitted(LowRankEmbedding.parse({"rank": 3}), table(9, 5), matrix(9, 5))
    ids, hidden = torch.tensor([1, 8, 1]), matrix(2, 5, seed=7).requires_grad_()

    def both(weight: Tensor, projection: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tensors = {"weight": weight, "projection": projection}
        return torch.func.functional_call(lookup, tensors, (ids,)), F.linear(F.linear(hidden, projection), weight)

    torch.testing.assert_close(both(lookup.weight, lookup.projection, hidden)[1], lookup.logits(hidden))
    assert torch.autograd.gradcheck(both, (lookup.weight, lookup.projection, hidden))


@pytest.mark.parametrize(
    ("method", "site"),
    [(LowRankLinear, line(12, 30)), (LowRankLinear, line(30, 12, bias=False)), (LowRankEmbedding, table())],
)
def test_predicted_cost_is_counted_cost_within_keep_and_monotone(method, site):
    keeps, counts = (0.3, 0.5, 0.7, 1.0), []
    for keep in keeps:
        solved = method.parse({}, keep).solve(site, keep)
        assert solved.fits(site) is None
        part, cost = solved.build(site, CPU, torch.float64), solved.predict(site)
        assert cost.parameters == sum(one.numel() for one in part.parameters()) <= keep * site.dense().parameters
        assert cost.bytes == sum(one.nbytes for one in part.state_dict().values())
        wider = method.parse({"rank": solved.rank + 1})
        assert wider.predict(site).parameters > keep * site.dense().parameters
        skeleton = solved.build(site, torch.device("meta"), torch.float64).state_dict()
        assert {key: one.shape for key, one in skeleton.items()} == {k: v.shape for k, v in part.state_dict().items()}
        counts.append(cost)
    assert [cost.parameters for cost in counts] == sorted({cost.parameters for cost in counts})
    assert [cost.flops_per_token for cost in counts] == sorted({cost.flops_per_token for cost in counts})


def test_keep_gives_the_ranks_of_the_paper():
    for keep, rank in ((0.3125, 256), (0.625, 512)):
        assert LowRankLinear.parse({}, keep).solve(line(4096, 1024, bias=False), keep).rank == rank


def test_a_large_rank_from_keep_is_a_multiple_of_eight_and_a_given_one_is_left_alone():
    for keep in (0.16, 0.2, 0.32, 0.5, 0.77, 1.0):
        site = line(1536, 1024)
        rank, dense = LowRankLinear.parse({}, keep).solve(site, keep).rank, site.dense().parameters
        exact = int((keep * dense - 1536) // (1536 + 1024))
        assert rank == (exact if exact < 128 else exact - exact % 8)
    assert linear(131).predict(line(1536, 1024)).parameters == 131 * (1536 + 1024) + 1536


def test_a_random_start_is_the_best_approximation_of_a_standard_one():
    torch.manual_seed(0)
    part = linear(8).build(line(64, 96), CPU, torch.float64)
    left = part.weight @ part.weight.T
    torch.testing.assert_close(left, part.projection @ part.projection.T, rtol=0, atol=1e-9)
    assert 0.2 < left.diagonal().max() < 0.02 * (64**0.5 + 96**0.5) * 1.2
    lookup = LowRankEmbedding.parse({"rank": 16}).build(table(4000, 64, padding_row=0), CPU, torch.float64)
    assert lookup.merged().std().item() == pytest.approx(0.02, rel=0.05)
    assert lookup.merged()[0].abs().max() == 0


def test_wrong_input_is_refused_with_the_reason():
    assert "below 12" in linear(12).fits(line(12, 30))
    assert "below 16" in LowRankEmbedding.parse({"rank": 16}).fits(table())
    for method, site in ((LowRankLinear, line(12, 30)), (LowRankEmbedding, table())):
        with pytest.raises(TautError, match="give keep or rank"):
            method.parse({})
        with pytest.raises(TautError, match="give keep or rank"):
            method().fits(site)
        with pytest.raises(TautError, match="not both"):
            method.parse({"rank": 3}, 0.5)
        with pytest.raises(TautError, match="leaves no rank"):
            method.parse({}, 0.01).solve(site, 0.01)
        with pytest.raises(TautError, match="rank"):
            method.parse({"rank": 0})
        with pytest.raises(TautError, match="did you mean 'rank'"):
            method.parse({"ranks": 3}, 0.5)
