"""BlockDense and BlockShuffle: the maps, their fit to trained weights and their kernel, in double precision."""

import math
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import taut
from taut.contract.tiny import tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.site import LinearSite
from taut.methods.base import Calibration
from taut.methods.linear.block_dense import BlockDenseLinear
from taut.methods.linear.block_shuffle import BlockShuffleLinear
from taut.methods.linear.low_rank import LowRankLinear
from taut.ops.factors.block_fit import block_factors, block_factors_for, definite
from taut.ops.factors.block_matmul import block_product, reference
from taut.ops.factors.svd import DAMPING, balanced_factors_for, damped
from taut.surgery.plan import make_plan

CPU = torch.device("cpu")
NOTHING = Calibration()
SHAPES = [(12, 24), (24, 12), (36, 12), (12, 36)]
METHODS = [(BlockDenseLinear, {"blocks": 3, "rank": 6}), (BlockShuffleLinear, {"blocks": 3})]


def matrix(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gram(width: int, tokens: int = 200, seed: int = 1) -> Tensor:
    """Of strongly correlated inputs; singular when there are fewer tokens than dimensions."""
    inputs = matrix(tokens, width, seed=seed) @ (matrix(width, width, seed=seed + 1) / torch.arange(1.0, width + 1))
    return inputs.T @ inputs / tokens


def line(outputs: int, inputs: int, bias: bool = True, slot: str = "feedforward", dtype: str = "float64") -> LinearSite:
    return LinearSite(slot=slot, path="a.b", layer=0, role="up", dtype=dtype, inputs=inputs, outputs=outputs, bias=bias)


def built(method, knobs, site: LinearSite, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    part = method.parse(knobs).build(site, CPU, dtype)
    if part.bias is not None:
        nn.init.normal_(part.bias)
    return part


def fitted(method, knobs, weight: Tensor, calibration: Calibration = NOTHING):
    method, site = method.parse(knobs), line(*weight.shape)
    part = method.build(site, CPU, torch.float64)
    method.fit(part, weight, calibration)
    return part


def error(part, weight: Tensor, inputs_gram: Tensor) -> float:
    """E ||(W - W') x||^2."""
    gap = weight - part.merged()
    return torch.trace(gap @ inputs_gram @ gap.T).item()


def shuffled(part) -> Tensor:
    """The weight of BlockShuffle by the paper's index map, one number at a time."""
    inner, outer = (tensor.detach().transpose(1, 2) for tensor in (part.projection, part.weight))
    blocks, run, width = inner.shape
    weight = torch.zeros(part.out_features, part.in_features, dtype=inner.dtype)
    for block, own in product(range(blocks), range(run)):
        hidden = block * run + own
        share, slot = hidden % blocks, hidden // blocks
        for place in range(outer.shape[1]):
            weight[place * blocks + share, block * width : (block + 1) * width] += (
                outer[share, place, slot] * inner[block, own]
            )
    return weight


@pytest.mark.parametrize("shape", [*SHAPES, (12, 12)])
@pytest.mark.parametrize(("method", "knobs"), METHODS)
def test_forward_is_the_merged_map_whatever_the_leading_axes(method, knobs, shape):
    for bias in (True, False):
        part = built(method, knobs, line(*shape, bias=bias))
        for leading in ((), (1,), (5,), (2, 3), (2, 1, 4), (0,)):
            x = matrix(*leading, shape[1], seed=3)
            torch.testing.assert_close(part(x), F.linear(x, part.merged(), part.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, (12, 12)])
@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_shuffle_follows_the_index_map_and_its_merged_weight_has_both_permutations(shape, blocks):
    part = built(BlockShuffleLinear, {"blocks": blocks}, line(*shape))
    torch.testing.assert_close(part.merged(), shuffled(part), rtol=0, atol=1e-14)
    hidden = min(shape)
    run = hidden // blocks
    middle = torch.zeros(hidden, hidden, dtype=torch.float64)
    middle[[t % blocks * run + t // blocks for t in range(hidden)], range(hidden)] = 1
    width = shape[0] // blocks
    last = torch.zeros(shape[0], shape[0], dtype=torch.float64)
    last[[s * blocks + l for l in range(blocks) for s in range(width)], range(shape[0])] = 1
    outer, inner = (torch.block_diag(*one.transpose(1, 2)) for one in (part.weight, part.projection))
    torch.testing.assert_close(part.merged(), last @ outer @ middle @ inner, rtol=0, atol=1e-14)
    if blocks**2 <= hidden:
        assert (part.merged() != 0).all()
        assert ((outer @ inner) != 0).double().mean() == 1 / blocks


@pytest.mark.parametrize("shape", SHAPES)
def test_one_block_is_low_rank_or_two_dense_matrices(shape):
    dense = built(BlockDenseLinear, {"blocks": 1, "rank": 5}, line(*shape))
    low = built(LowRankLinear, {"rank": 5}, line(*shape))
    assert dense.numbers() == low.numbers()
    low.set_factors(dense.weight.T, dense.projection[0])
    low.bias = dense.bias
    x = matrix(4, shape[1], seed=2)
    torch.testing.assert_close(dense(x), low(x), rtol=0, atol=1e-14)
    shuffle = built(BlockShuffleLinear, {"blocks": 1}, line(*shape))
    torch.testing.assert_close(shuffle.merged(), shuffle.weight[0].T @ shuffle.projection[0].T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "knobs"), METHODS)
def test_a_random_start_is_orthonormal_block_by_block(method, knobs, shape):
    part = method.parse(knobs).build(line(*shape), CPU, torch.float64)
    blocks = [*part.projection, *(part.weight if method is BlockShuffleLinear else [part.weight])]
    for block in blocks:
        values = torch.linalg.svdvals(block)
        torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-5)
    assert part.bias.abs().max() == 0
    half = method.parse(knobs).build(line(*shape, dtype="bfloat16"), CPU, torch.bfloat16)
    assert half(torch.randn(3, shape[1], dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "knobs"), METHODS)
@pytest.mark.parametrize("calibration", [NOTHING, Calibration(gram(12)), Calibration(gram(24)), Calibration(gram(36))])
def test_a_weight_of_the_form_is_recovered(method, knobs, shape, calibration):
    if calibration.gram is None or len(calibration.gram) == shape[1]:
        weight = built(method, knobs, line(*shape)).merged().detach()
        part = fitted(method, knobs, weight, calibration)
        torch.testing.assert_close(part.merged(), weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_fits_lose_exactly_the_discarded_singular_values_of_each_pair(shape):
    weight = matrix(*shape)
    part = fitted(BlockDenseLinear, {"blocks": 3, "rank": 6}, weight)
    lost = sum(torch.linalg.svdvals(one)[2:].square().sum() for one in weight.chunk(3, 1))
    torch.testing.assert_close((weight - part.merged()).square().sum(), lost, rtol=1e-9, atol=0)
    for blocks, rank in ((2, min(shape) // 4), (3, None)):
        part = fitted(BlockShuffleLinear, {"blocks": blocks}, weight)
        run, lost = min(shape) // blocks, 0.0
        for share, block in product(range(blocks), range(blocks)):
            shared = sum((block * run + own) % blocks == share for own in range(run))
            assert rank in (None, shared)
            pair = weight[share::blocks].chunk(blocks, 1)[block]
            lost += torch.linalg.svdvals(pair)[shared:].square().sum()
        torch.testing.assert_close((weight - part.merged()).square().sum(), lost, rtol=1e-9, atol=0)


def test_factors_are_balanced():
    for outer, inner in block_factors_for(matrix(10, 12), gram(12), [2, 3], DAMPING):
        left, right = outer.T @ outer, inner @ inner.T
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)
        torch.testing.assert_close(left, torch.diag(left.diagonal()), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("method", "knobs"), METHODS)
@pytest.mark.parametrize("tokens", [200, 6])
def test_the_activation_aware_fit_is_better_on_its_inputs_also_where_their_gram_matrix_is_singular(
    method, knobs, shape, tokens
):
    weight, seen = matrix(*shape), gram(shape[1], tokens)
    plain = fitted(method, {**knobs, "activation_aware": False}, weight, Calibration(gram=seen))
    aware = fitted(method, knobs, weight, Calibration(gram=seen))
    assert error(aware, weight, seen) < 0.9 * error(plain, weight, seen)
    assert aware.weight.isfinite().all()
    torch.testing.assert_close(plain.merged(), fitted(method, knobs, weight).merged(), rtol=0, atol=0)
    again = fitted(method, knobs, weight, Calibration(gram=seen))
    assert torch.equal(again.weight, aware.weight)
    assert torch.equal(again.projection, aware.projection)


def test_the_fit_in_turns_meets_the_optima_that_are_known():
    weight, seen = matrix(10, 12), gram(12)
    (outer, inner), *_ = block_factors_for(weight, seen, [4], DAMPING)
    expected, other = balanced_factors_for(weight, seen, 4, DAMPING)
    torch.testing.assert_close(outer @ inner, expected @ other, rtol=0, atol=1e-7)
    # Blocks whose inputs do not correlate have nothing to make up for: each is optimal by itself.
    apart = torch.block_diag(gram(6), gram(6, seed=5))
    metric = damped(apart, DAMPING)
    for block, (outer, inner) in enumerate(block_factors_for(weight, apart, [2, 3], DAMPING)):
        own = slice(6 * block, 6 * block + 6)
        best, other = balanced_factors_for(weight[:, own], metric[own, own], 2 + block, 0.0)
        torch.testing.assert_close(outer @ inner, best @ other, rtol=0, atol=1e-6)


def test_inputs_that_say_nothing_give_the_plain_fit():
    weight = matrix(10, 12)
    plain = torch.cat([outer @ inner for outer, inner in block_factors(weight, [2, 3])], dim=1)
    for says_nothing in (torch.eye(12, dtype=torch.float64), torch.zeros(12, 12)):
        fit = torch.cat([u @ v for u, v in block_factors_for(weight, says_nothing, [2, 3], DAMPING)], dim=1)
        torch.testing.assert_close(fit, plain, rtol=0, atol=1e-7)


def test_a_gram_matrix_that_rounding_made_indefinite_is_damped_until_it_is_not():
    weight, seen = matrix(10, 12), gram(12, tokens=6)
    seen -= 0.01 * seen.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    assert torch.linalg.eigvalsh(damped(seen, DAMPING)).min() < 0 < torch.linalg.eigvalsh(definite(seen, DAMPING)).min()
    factors = block_factors_for(weight, seen, [2, 3], DAMPING)
    assert all(one.isfinite().all() and one.abs().max() < 100 for pair in factors for one in pair)
    with pytest.raises(TautError, match="not finite"):
        block_factors_for(weight, seen * math.nan, [2, 3], DAMPING)


def test_no_turn_of_the_fit_raises_the_error(monkeypatch):
    weight, seen, errors = matrix(16, 24), gram(24), []
    for sweeps in range(6):
        monkeypatch.setattr("taut.ops.factors.block_fit.SWEEPS", sweeps)
        fit = torch.cat([u @ v for u, v in block_factors_for(weight, seen, [2, 2, 2], DAMPING)], dim=1)
        errors.append(torch.trace((weight - fit) @ damped(seen, DAMPING) @ (weight - fit).T).item())
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("interleaved", "feature_major", "tokens"), product([False, True], [False, True], [0, 1, 2, 9, 40])
)
def test_the_kernel_computes_its_formula_in_any_layout(interleaved, feature_major, tokens):
    weight, bias = matrix(3, 4, 5), matrix(15, seed=1)
    for x, plus in product((matrix(tokens, 12, seed=2), matrix(12, tokens, seed=2).T), (bias, None)):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                y = block_product(x, weight, plus, interleaved=interleaved, feature_major=feature_major)
            torch.testing.assert_close(y, reference(x, weight, plus, interleaved), rtol=0, atol=1e-12)
            assert tokens < 2 or y.stride() == ((1, tokens) if feature_major else (15, 1))


@pytest.mark.parametrize(("interleaved", "feature_major", "tokens"), product([False, True], [False, True], [1, 3, 33]))
def test_the_gradients_of_the_kernel_agree_with_finite_differences(interleaved, feature_major, tokens):
    tensors = tuple(one.requires_grad_() for one in (matrix(tokens, 8), matrix(2, 4, 3, seed=1), matrix(6, seed=2)))

    def kernel(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return block_product(x, weight, bias, interleaved=interleaved, feature_major=feature_major)

    assert torch.autograd.gradcheck(kernel, tensors)
    assert torch.autograd.gradgradcheck(kernel, tensors)


def test_a_gradient_lies_in_memory_as_its_input_does():
    weight = matrix(3, 4, 5).requires_grad_()
    for x in (matrix(40, 12, seed=2), matrix(12, 40, seed=2).T):
        y = block_product(x.requires_grad_(), weight)
        (to_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert to_x.stride() == x.stride()


@pytest.mark.parametrize(("method", "knobs"), METHODS)
def test_gradients_of_a_part_are_those_of_its_merged_map(method, knobs):
    part, x = built(method, knobs, line(12, 24)), matrix(2, 3, 24, seed=6).requires_grad_()
    wanted = torch.autograd.grad(F.linear(x, part.merged(), part.bias).square().sum(), [x, *part.parameters()])
    gradients = torch.autograd.grad(part(x).square().sum(), [x, *part.parameters()])
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("method", "knobs"), METHODS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_is_eager(method, knobs, backend):
    torch.compiler.reset()
    block = nn.Sequential(built(method, knobs, line(36, 12)), nn.GELU(), built(method, knobs, line(12, 36)))
    compiled = torch.compile(block, backend=backend, fullgraph=True)
    for tokens in (1, 4):
        x = matrix(2, tokens, 12, seed=tokens).requires_grad_()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=1e-12)
        gradients = torch.autograd.grad(compiled(x).square().sum(), [x, *block.parameters()])
        wanted = torch.autograd.grad(block(x).square().sum(), [x, *block.parameters()])
        for one, other in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "knobs"), METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast_answer_like_float(method, knobs, dtype):
    part, x = built(method, knobs, line(36, 12), torch.float32), torch.randn(2, 5, 12)
    exact, room = part(x), 0.1 if dtype == torch.bfloat16 else 0.02
    with torch.autocast("cpu", dtype):
        answer = part(x)
    assert answer.dtype == dtype
    answer.float().sum().backward()
    assert all(one.grad.dtype == torch.float32 for one in part.parameters())
    torch.testing.assert_close(answer.float(), exact, rtol=0, atol=room)
    torch.testing.assert_close(part.to(dtype)(x.to(dtype)).float(), exact, rtol=0, atol=room)


@pytest.mark.parametrize(
    ("method", "site"),
    [
        (BlockDenseLinear, line(48, 12)),
        (BlockDenseLinear, line(12, 48, bias=False)),
        (BlockShuffleLinear, line(576, 144)),
        (BlockShuffleLinear, line(144, 576, bias=False)),
        (BlockShuffleLinear, line(144, 144)),
    ],
)
@pytest.mark.parametrize("store", [{}, {"store": {"method": "low_bit", "bits": 4}}])
def test_predicted_cost_is_counted_cost_within_keep_and_monotone(method, site, store):
    counts = []
    for keep in (0.3, 0.5, 0.7, 1.0):
        solved = method.parse(store, keep).solve(site, keep)
        assert solved.fits(site) is None
        part, cost = solved.build(site, CPU, torch.float64), solved.predict(site)
        assert cost.parameters == part.numbers() <= keep * site.dense().parameters
        assert cost.bytes == sum(one.nbytes for one in part.state_dict().values())
        assert cost.flops_per_token == 2 * (part.held("weight").numel() + part.held("projection").numel())
        skeleton = solved.build(site, torch.device("meta"), torch.float64).state_dict()
        assert {key: one.shape for key, one in skeleton.items()} == {k: v.shape for k, v in part.state_dict().items()}
        counts.append(cost.parameters)
    assert counts == sorted(counts)


def test_keep_gives_the_blocks_of_the_paper_and_the_greatest_rank_that_it_allows():
    for keep, blocks in ((0.3125, 4), (0.32, 4), (0.625, 2), (0.63, 2)):
        for shape in ((3072, 768), (1024, 4096)):
            assert BlockShuffleLinear.parse({}, keep).solve(line(*shape, bias=False), keep).blocks == blocks
    pair = line(4096, 1024, bias=False), line(1024, 4096, bias=False)
    published = BlockDenseLinear.parse({"blocks": 4, "rank": 768})
    share = sum(published.predict(site).parameters for site in pair) / sum(site.dense().parameters for site in pair)
    assert share == pytest.approx(0.586, abs=5e-4)
    site = line(48, 12)
    for keep, blocks in product((0.4, 0.55, 0.9), (2, 3)):
        solved = BlockDenseLinear.parse({"blocks": blocks}, keep).solve(site, keep)
        wider = BlockDenseLinear.parse({"blocks": blocks, "rank": solved.rank + blocks})
        assert wider.predict(site).parameters > keep * site.dense().parameters
    large = BlockDenseLinear.parse({}, 0.32).solve(line(8192, 2048), 0.32)
    assert large.rank == 576
    assert math.gcd(large.rank // 2, 8) == 8


def test_wrong_input_is_refused_with_what_is_possible():
    dense, shuffle = BlockDenseLinear, BlockShuffleLinear
    assert "5 blocks do not divide the 12 inputs: try 2, 3, 4, 6, 12" in dense.parse({"blocks": 5, "rank": 5}).fits(
        line(48, 12)
    )
    assert "rank 7 is not a multiple of the 2 blocks: try 6 or 8" in dense.parse({"rank": 7}).fits(line(48, 12))
    assert "must be at most 10" in dense.parse({"rank": 12}).fits(line(48, 12))
    assert dense.parse({"rank": 10}).fits(line(48, 12)) is None
    assert "possible: 2, 3" in shuffle.parse({"blocks": 5}).fits(line(48, 12))
    assert "possible: 2, 3" in shuffle.parse({"blocks": 4}).fits(line(48, 12))
    assert "possible: 2, 3" in shuffle.parse({"blocks": 1}).fits(line(48, 12))
    assert "no number of blocks" in shuffle.parse({"blocks": 2}).fits(line(7, 12))
    with pytest.raises(TautError, match="leaves no rank.*the least is 0.25"):
        dense.parse({}, 0.1).solve(line(48, 12), 0.1)
    with pytest.raises(TautError, match="do not divide"):
        dense.parse({"blocks": 5}, 0.5).solve(line(48, 12), 0.5)
    with pytest.raises(TautError, match="leaves no blocks.*the least is 0.4"):
        shuffle.parse({}, 0.2).solve(line(48, 12), 0.2)
    with pytest.raises(TautError, match="none is possible"):
        shuffle.parse({}, 0.2).solve(line(7, 12), 0.2)
    for method, dial in ((dense, "rank"), (shuffle, "blocks")):
        with pytest.raises(TautError, match=f"give keep or {dial}"):
            method.parse({})
        with pytest.raises(TautError, match="not both"):
            method.parse({dial: 4}, 0.5)
        with pytest.raises(TautError, match=dial):
            method.parse({dial: 0})
        with pytest.raises(TautError, match="did you mean 'blocks'"):
            method.parse({"block": 4}, 0.5)


@pytest.mark.parametrize("line", [{"method": "low_rank", "rank": 4}, {"method": "block_dense", "rank": 4}, {"method": "block_shuffle", "blocks": 4}], ids=lambda line: line["method"])  # fmt: skip  # noqa: E501
def test_the_first_feed_forward_layer_stays_dense_unless_layers_says_otherwise(line):
    def layers(family: str, slot: str = "feedforward", **more) -> set[tuple[str, int]]:
        """The layers that are touched, by stack."""
        plan = make_plan(tiny(family), Recipe.parse({slot: {**line, **more}}))
        reasons = [reason for _, reason in plan.untouched if "first layer stays dense" in reason]
        assert all("layers: ':'" in reason and line["method"] in reason for reason in reasons)
        assert bool(reasons) == (slot == "feedforward" and not more)
        return {(step.site.stack, step.site.layer) for step in plan.steps}

    assert layers("bert") == {("", 1)}
    assert layers("bert", layers=":") == {("", 0), ("", 1)}
    assert layers("bert", layers="0") == {("", 0)}
    assert layers("t5") == {("encoder", 1), ("decoder", 1)}
    assert layers("bert", "projection") == {("", 0), ("", 1)}
    alone = taut.plan("llama:hidden_size=32,num_hidden_layers=1,num_attention_heads=4", {"feedforward": line})
    assert {step.site.layer for step in alone.steps} == {0}
