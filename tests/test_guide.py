"""Self-guided training: exact invariants of the guided sum, its schedule, its draws, and what is left at the end."""

import json
import math
from pathlib import Path

import pytest
import torch
from runs import LOW_RANK, small
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import taut
from taut.contract.tiny import inputs, tiny
from taut.core.errors import TautError
from taut.core.registry import METHODS
from taut.core.site import LinearSite
from taut.methods.part import LinearPart
from taut.training.budget import costs_of
from taut.training.guide import Guides, guided_parts
from taut.training.objective import LanguageModelling
from taut.training.run import train
from taut.training.schedule import guide_weight

KNOBS = {
    "low_rank": {"rank": 5},
    "block_dense": {"blocks": 2, "rank": 6},
    "block_shuffle": {"blocks": 2},
}
"""The published maps, as far as they are methods here."""
STRUCTURED = [name for name in KNOBS if f"linear.{name}" in METHODS.ids("linear")]


def part(name: str = "low_rank", inputs: int = 12, outputs: int = 20, bias: bool = True) -> LinearPart:
    """float64, with a bias that is not zero."""
    torch.manual_seed(1)
    site = LinearSite(
        slot="feedforward", path="up", layer=1, role="up", dtype="float64", inputs=inputs, outputs=outputs, bias=bias
    )
    made = METHODS.get(f"linear.{name}").parse(KNOBS[name]).build(site, torch.device("cpu"), torch.float64)
    if bias:
        torch.nn.init.normal_(made.bias)
    return made.train()


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def tensors(of: LinearPart) -> list[torch.nn.Parameter]:
    return [tensor for name, tensor in of.named_parameters() if name != "bias"]


def test_low_rank_is_always_tried() -> None:
    assert "low_rank" in STRUCTURED


@pytest.mark.parametrize("name", STRUCTURED)
@pytest.mark.parametrize(("wide", "tall"), [(12, 20), (20, 12)])
def test_the_first_answer_does_not_depend_on_the_weight(name: str, wide: int, tall: int) -> None:
    structured = part(name, wide, tall)
    x = numbers(2, 3, wide)
    alone = structured(x)
    guides = Guides({"up": structured}, stochastic=False)
    for weight in (0.0, 0.3, 1.0):
        guides.begin(0, weight)
        assert torch.allclose(structured(x), alone, rtol=0, atol=1e-12)
    guides.begin(0, 0.0)
    assert torch.equal(structured(x), alone)


@pytest.mark.parametrize("name", STRUCTURED)
def test_without_weight_the_guide_gets_no_gradient(name: str) -> None:
    structured = part(name)
    guides = Guides({"up": structured}, stochastic=False)
    guides.begin(9, 0.0)
    structured(numbers(4, 12)).square().sum().backward()
    assert guides.maps[0].grad is None
    assert all(tensor.grad.abs().sum() > 0 for tensor in tensors(structured))


@pytest.mark.parametrize("name", STRUCTURED)
def test_with_full_weight_the_guide_learns_as_a_dense_layer(name: str) -> None:
    structured, x, target = part(name), numbers(4, 12), numbers(4, 20) * 3
    guides = Guides({"up": structured}, stochastic=False)
    guides.begin(0, 1.0)
    (structured(x) - target).square().sum().backward()
    dense, bias = structured.merged().detach().requires_grad_(), structured.bias.detach().requires_grad_()
    (F.linear(x, dense, bias) - target).square().sum().backward()
    assert torch.allclose(guides.maps[0].grad, dense.grad, rtol=1e-12, atol=1e-12)
    assert torch.allclose(structured.bias.grad, bias.grad, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(tensor.grad, torch.zeros_like(tensor)) for tensor in tensors(structured))


@pytest.mark.parametrize("name", STRUCTURED)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    structured, x = part(name), numbers(3, 12).requires_grad_()
    guides = Guides({"up": structured}, stochastic=False)
    torch.nn.init.normal_(guides.maps[0])
    guides.begin(3, 0.4)

    def answer(x: Tensor, *_: Tensor) -> Tensor:
        return structured(x)

    assert torch.autograd.gradcheck(answer, (x, guides.maps[0], *structured.parameters()))


def test_a_skipped_guide_leaves_the_answer_unweighted() -> None:
    structured = part()
    x = numbers(4, 12)
    alone = structured(x)
    guides = Guides({"up": structured}, stochastic=True)
    torch.nn.init.normal_(guides.maps[0])
    weight, kinds = 0.5, set()
    mixture = weight * F.linear(x, guides.maps[0], structured.bias) + (1 - weight) * alone
    for step in range(12):
        guides.begin(step, weight)
        guides.next_piece()
        used = guides.drawn(0)
        assert torch.equal(structured(x), mixture if used else alone)
        kinds.add(used)
    assert kinds == {True, False}
    assert guides.calls == 12
    assert guides.flops == guides.uses * 3 * 2 * 12 * 20 * 4


@pytest.mark.parametrize("weight", [0.05, 0.3, 0.5, 0.9])
def test_a_guide_is_used_as_often_as_its_weight(weight: float) -> None:
    guides = Guides({"up": part()}, stochastic=True, seed=3)
    used = 0
    for step in range(10_000):
        guides.begin(step, weight)
        guides.next_piece()
        used += guides.drawn(0)
    assert abs(used / 10_000 - weight) <= 3 * math.sqrt(weight * (1 - weight) / 10_000)


def test_draws_follow_from_seed_step_piece_process_and_map() -> None:
    def draws(seed: int = 0, rank: int = 0, first: int = 0, index: int = 0, pieces: int = 1) -> list[bool]:
        guides = Guides({"a": part(), "b": part()}, seed=seed, rank=rank)
        answers = []
        for step in range(first, 64):
            guides.begin(step, 0.5)
            for _ in range(pieces):
                guides.next_piece()
                answers.append(guides.drawn(index))
        return answers

    base = draws()
    assert draws() == base
    assert draws(first=10) == base[10:]
    assert draws(pieces=2)[::2] == base
    assert draws(pieces=2)[1::2] != base
    assert all(draws(**other) != base for other in ({"seed": 1}, {"rank": 1}, {"index": 1}))


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_the_weight_falls_from_one_to_nothing(shape: str) -> None:
    steps = 40
    weights = [guide_weight(step, steps, shape) for step in range(60)]
    assert weights[0] == 1.0
    assert weights[steps // 2] == pytest.approx(0.5, abs=1e-12)
    assert weights[steps:] == [0.0] * 20
    assert weights[:steps] == sorted(weights[:steps], reverse=True)
    assert abs(sum(weights[:steps]) / steps - 0.5) <= 1 / steps


def test_evaluation_sees_the_part_alone() -> None:
    structured = part()
    guides = Guides({"up": structured}, stochastic=False)
    torch.nn.init.normal_(guides.maps[0])
    guides.begin(0, 0.7)
    x = numbers(4, 12)
    guided, alone = structured(x), structured.eval()(x)
    assert not torch.allclose(guided, alone)
    assert torch.allclose(alone, F.linear(x, structured.merged(), structured.bias), atol=1e-12)
    structured.train()
    guides.remove()
    assert torch.equal(structured(x), alone)


def test_guides_do_not_enter_the_model(tmp_path: Path) -> None:
    model = tiny("gpt2")
    taut.apply(model, {"feedforward": {"method": "low_rank", "keep": 0.5, "layers": "1:"}})
    before = list(model.state_dict())
    parts = guided_parts(model, ("feedforward", "projection"))
    guides = Guides(parts, stochastic=False)
    task = LanguageModelling(model, guides, lambda step: guide_weight(step, 4, "cosine"))
    assert [name for name, _ in task.named_parameters() if name.startswith("guides.")] == [
        "guides.maps.0",
        "guides.maps.1",
    ]
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2)
    ids = inputs(model, 2, 12)["input_ids"]
    for step in range(6):
        task.train()
        task.begin(step)
        task(ids, ids)["loss"].backward()
        assert all((guide.grad is None) == (step >= 4) for guide in guides.maps)
        optimizer.step()
        optimizer.zero_grad()
    assert list(model.state_dict()) == before
    model.eval().save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert costs_of(model, 12, guides).guides == 3 * sum(2 * guide.numel() for guide in guides.maps)


def test_what_cannot_be_guided_is_refused() -> None:
    plain = tiny("llama")
    with pytest.raises(TautError, match="puts no linear part into feedforward"):
        guided_parts(plain, ("feedforward",))
    model = tiny("llama")
    low_bit = {"method": "low_bit", "bits": 8}
    taut.apply(model, {"projection": low_bit, "feedforward": {"method": "low_rank", "keep": 0.5, "layers": ":"}})
    assert len(guided_parts(model, ("feedforward",))) == 6
    with pytest.raises(TautError, match=r"projection.0.q \(linear.low_bit\) keeps .* that no gradient reaches"):
        guided_parts(model, ("feedforward", "projection"))


@pytest.mark.parametrize("guide", [{"stochastic": False, "schedule": "linear"}, {"mode": "matched_flops"}], ids=str)
def test_the_record_says_what_guides_cost(tmp_path: Path, guide: dict) -> None:
    recipe = {"feedforward": {"method": "low_rank", "keep": 0.3, "layers": "1:"}}
    done = train(small(tmp_path, recipe=recipe, guide=guide, budget={"steps": 40}), tmp_path / "out").record
    facts, flops = done["guide"], done["flops_per_token"]
    step = 4 * 16 * flops["guides"]
    assert facts["calls"] == 3 * facts["steps"]
    assert facts["flops_used"] == pytest.approx(step * facts["uses"] / 3)
    if guide.get("mode") == "matched_flops":
        share = (flops["dense"] - flops["model"]) / (flops["model"] + flops["guides"] / 2)
        assert facts["share"] == pytest.approx(share)
        assert facts["steps"] == math.floor(share * 40)
        assert done["spent"]["steps"] == 40 + facts["steps"]
        # Expected FLOPs are those of 40 dense steps, but for the rounding of the share to whole steps.
        expected = done["spent"]["flops"] - facts["flops_used"] + facts["flops_expected"]
        assert expected == pytest.approx(40 * 4 * 16 * flops["dense"], rel=0.03)
        assert 0 < facts["uses"] < facts["calls"]
    else:
        assert facts["steps"] == 20
        assert facts["uses"] == facts["calls"]
        assert facts["flops_used"] == facts["flops_expected"]
    assert json.loads((tmp_path / "out" / "training.json").read_text()) == done


def test_a_guide_changes_what_is_learned(tmp_path: Path) -> None:
    """And only from the first update on: the first loss is that of the structured model."""
    losses = [
        train(small(tmp_path, recipe=LOW_RANK, guide=guide), tmp_path / str(number)).record["losses"]
        for number, guide in enumerate((None, {"stochastic": False}))
    ]
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6)
    assert losses[0][2:] != losses[1][2:]
