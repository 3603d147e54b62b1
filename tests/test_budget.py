"""What training costs, what a budget buys, and how rates and batches go."""

import pytest
from published_decoders import Decoder, block_dense_map, block_shuffle_map, dense_map, low_rank_map
from runs import LOW_RANK, SMALL

import taut
from taut.contract.tiny import inputs, tiny
from taut.core.errors import TautError
from taut.measurement.count import flops_per_token
from taut.training.budget import Costs, costs_of, plan_course
from taut.training.flops import matched_share
from taut.training.schedule import course, rate
from taut.training.spec import TrainSpec

SIZES = {
    "s": Decoder(768, 3072, 12, 12),
    "m": Decoder(1024, 4096, 24, 16),
    "l": Decoder(1536, 6144, 24, 12),
    "xl": Decoder(2048, 8192, 24, 16),
}


# The published table: size and feed-forward weights in millions, training FLOPs for 25.5 billion tokens.
@pytest.mark.parametrize(
    ("numbers", "size", "feedforward", "flops"),
    [
        (dense_map, 1274, 805, "2.10e+20"),
        (low_rank_map(1024), 985, 516, "1.66e+20"),
        (block_dense_map(4, 1536), 955, 486, "1.61e+20"),
        (block_shuffle_map(2), 985, 516, "1.66e+20"),
        (low_rank_map(512), 744, 275, "1.29e+20"),
        (block_dense_map(4, 768), 728, 260, "1.27e+20"),
        (block_shuffle_map(4), 744, 275, "1.29e+20"),
    ],
)
def test_the_published_sizes_and_flops(numbers, size: int, feedforward: int, flops: str) -> None:
    decoder = SIZES["xl"]
    assert round(decoder.parameters(numbers) / 1e6) == size
    assert round(decoder.feedforward(numbers) / 1e6) == feedforward
    assert f"{decoder.training_flops(25.5e9, numbers):.2e}" == flops


@pytest.mark.parametrize(
    ("name", "numbers", "share"),
    [
        ("s", low_rank_map(192), 0.30),
        ("m", low_rank_map(256), 0.38),
        ("l", low_rank_map(384), 0.41),
        ("xl", low_rank_map(512), 0.43),
        ("m", block_dense_map(4, 384), 0.40),
        ("xl", block_dense_map(4, 768), 0.45),
    ],
)
def test_the_published_guided_shares(name: str, numbers, share: float) -> None:
    decoder = SIZES[name]
    guided_share = decoder.guided_share(numbers)
    assert round(guided_share, 2) == share
    guided = decoder.training_flops(1 + guided_share, numbers) + guided_share * decoder.guide_flops(1) / 2
    assert guided == pytest.approx(decoder.training_flops(1), rel=1e-12)


def test_the_published_wide_models() -> None:
    """Grouped queries: sizes of both, and 0.395 of the larger one's guided share."""
    medium = Decoder(1024, 4864, 24, 8, attention=512, key_heads=4)
    large = Decoder(1536, 7424, 24, 12, attention=768, key_heads=4)
    assert round(medium.parameters(low_rank_map(512)) / 1e6) == 219
    assert round(large.parameters(low_rank_map(768)) / 1e6) == 464
    assert round(Decoder(1024, 4864, 24, 16, key_heads=4).parameters() / 1e6) == 335
    assert round(Decoder(1536, 7424, 24, 12, key_heads=2).parameters() / 1e6) == 729
    numbers = low_rank_map(768)
    dense, ours = SIZES["l"].training_flops(1), large.training_flops(1, numbers)
    assert matched_share(dense, ours, large.guide_flops(1)) == pytest.approx(0.395, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "llama_untied", "qwen3"])
def test_flops_of_any_model_are_what_torch_counts(family: str) -> None:
    model = tiny(family)
    counted = 3 * flops_per_token(model, inputs(model, 2, 12)).value
    assert costs_of(model, 12).model == counted == costs_of(model, 12).dense
    taut.apply(model, {"feedforward": {"method": "low_rank", "keep": 0.5}})
    thin = costs_of(model, 12)
    assert thin.model == 3 * flops_per_token(model, inputs(model, 2, 12)).value < counted == thin.dense


def test_budgets_buy_whole_steps() -> None:
    costs = Costs(model=100.0, dense=150.0, guides=60.0)

    def total(budget: dict, guide: dict | None = None, **more) -> tuple[int, int]:
        spec = TrainSpec.load(
            SMALL | {"length": 10, "batch": 2, "budget": budget, "guide": guide, "recipe": LOW_RANK} | more
        )
        course = plan_course(spec, costs)
        return course.total, course.guided

    assert total({"steps": 7}) == (7, 0)
    assert total({"tokens": 79}) == (3, 0)
    assert total({"flops": 7999}) == (3, 0)
    assert total({"steps": 100}, {}) == (100, 50)
    assert total({"steps": 100}, {"share": 0.29}) == (100, 29)
    # (150 - 100) / (100 + 60 / 2), and twice as dear where every guide is computed.
    assert total({"steps": 130}, {"mode": "matched_flops"}) == (180, 50)
    assert total({"steps": 160}, {"mode": "matched_flops", "stochastic": False}) == (210, 50)
    # All FLOPs count: 20 x (100 + 0.5 x 30) a step.
    assert total({"flops": 23_000}, {}) == (10, 5)
    with pytest.raises(TautError, match="less than one step, which takes 20 tokens"):
        total({"tokens": 19})
    with pytest.raises(TautError, match="guides no step"):
        total({"steps": 3}, {"share": 0.1})
    with pytest.raises(TautError, match="a share is at most 1"):
        plan_course(
            TrainSpec.load(SMALL | {"guide": {"mode": "matched_flops"}, "recipe": LOW_RANK}), Costs(10.0, 100.0, 90.0)
        )


def test_rates_rise_and_fall() -> None:
    rates = [rate(step / 10, 0.1, 0.2, "cosine", 0.1) for step in range(11)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rate(0.6, 0.1, 0.2, "linear", 0.0) == pytest.approx(0.5)
    assert rate(1.7, 0.1, 0.0, "linear", 0.0) == 0.0
    assert rate(0.9, 0.1, 0.0, "constant", 0.0) == 1.0


def test_repeated_batches_come_at_the_end() -> None:
    whole = course(10, 0.4, "matched_flops")
    assert [whole.batch_of(step) for step in range(whole.total)] == [*range(10), *range(4)]
