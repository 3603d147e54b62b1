"""attention.relative: the own positions of models really gone, decoding in every way, and Transformer-XL."""

from pathlib import Path

import pytest
import torch
from decoding import CHUNKS, DECODERS, LENGTH
from runs import small
from test_train import Cut, cut_at, same, weights
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import taut
from taut.architectures.locate import locate
from taut.contract.tiny import FAMILIES, inputs, logits, padded_inputs, stepwise, tiny
from taut.core.errors import TautError
from taut.core.site import AttentionSite
from taut.methods.attention.relative.method import Relative
from taut.methods.base import LEARNED
from taut.surgery.positions import unturned
from taut.training.carried_memory import CarriedMemory
from taut.training.run import train

RELATIVE = {"attention": {"method": "relative"}}
RECURRENCE = {"memory": {"method": "segment_recurrence", "segment": 4, "memory": 3}}
LAYOUTS = [name for name in FAMILIES if not name.startswith("t5") and name != "gemma2"]
PLACED = [name for name in DECODERS if name in LAYOUTS]
EXACT = 1e-12


def placed(family: str, recipe: dict | None = None, dtype: torch.dtype = torch.float64, **changes) -> PreTrainedModel:
    """A tiny model under the method, whose distances matter as much as its contents."""
    model = tiny(family, dtype=dtype, **changes)
    taut.apply(model, RELATIVE if recipe is None else recipe)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if f".{LEARNED}." in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)
    return model


# The model's own positions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in PLACED if name != "bart"])
def test_positions_do_not_matter_any_more(family: str) -> None:
    """A constant shift changes nothing in rotary models anyway, so two tokens are also moved further apart."""
    batch = inputs(tiny(family), length=LENGTH)
    places = torch.arange(LENGTH).expand(2, -1)
    spread = places + 10 * (places > 11)
    original, model = tiny(family, dtype=torch.float64), placed(family)
    before = logits(original, **batch, position_ids=places, use_cache=True)
    assert (logits(original, **batch, position_ids=spread, use_cache=True) - before).abs().max() > 1e-3
    after = logits(model, **batch, position_ids=places, use_cache=True)
    # With a mask of ones positions that jump are not packed sequences.
    for other in (places + 100, spread):
        assert torch.equal(logits(model, **batch, position_ids=other, use_cache=True), after)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_without_distances_an_encoder_does_not_know_the_order(family: str) -> None:
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(3))
    ids = inputs(tiny(family), length=LENGTH)["input_ids"]
    original, model = tiny(family, dtype=torch.float64), placed(family)

    def moved(model: PreTrainedModel) -> float:
        return float((logits(model, input_ids=ids)[:, order] - logits(model, input_ids=ids[:, order])).abs().max())

    assert moved(original) > 1e-2
    assert moved(model) > 1e-2
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if name.endswith(f"{LEARNED}.weight"):
                tensor.zero_()
    assert moved(model) <= 1e-10


def test_a_table_of_positions_sets_no_limit() -> None:
    model = placed("gpt2", n_positions=16)
    batch = inputs(model, length=40)
    whole = logits(model, **batch, use_cache=False)
    assert (stepwise(model, [20, 1, 19], **batch)[0] - whole).abs().max() <= EXACT
    with pytest.raises(IndexError):
        logits(tiny("gpt2", n_positions=16), **batch)
    assert CarriedMemory.of(placed("gpt2", RELATIVE | RECURRENCE, n_positions=16)).positions is None


def test_a_table_learns_nothing_while_it_is_out() -> None:
    model = placed("gpt2").train()
    model(**inputs(model))["logits"].square().sum().backward()
    assert model.transformer.wpe.weight.grad.count_nonzero() == 0
    for name, tensor in model.named_parameters():
        if f".{LEARNED}." in name:
            assert tensor.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "bart"])
def test_undone_to_the_bit(family: str) -> None:
    original, model = tiny(family), placed(family, dtype=torch.float32)
    batch = inputs(model)
    assert not torch.equal(logits(original, **batch), logits(model, **batch))
    taut.undo(model)
    assert torch.equal(logits(original, **batch), logits(model, **batch))
    assert [type(module) for module in model.modules()] == [type(module) for module in original.modules()]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "bert"])
def test_a_folder_holds_all_of_it(family: str, tmp_path: Path) -> None:
    model = placed(family, dtype=torch.float32)
    batch = inputs(model)
    answer = logits(model, **batch)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, **batch), answer)
    if family != "bert":
        shifted = batch | {"position_ids": (torch.arange(12) * 2).expand(2, -1)}
        assert torch.equal(logits(again, **shifted), answer)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    halved = model.base_model.to(torch.bfloat16)
    assert torch.equal(logits(base, **batch), logits(halved, **batch))


# Decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PLACED)
@pytest.mark.parametrize("memory", [None, "segment_recurrence", "window_sink", "compressive", "anchor"])
def test_steps_equal_one_pass(family: str, memory: str | None) -> None:
    sizes = {
        "segment_recurrence": {"segment": 4, "memory": 3},
        "window_sink": {"sinks": 2, "window": 6},
        "anchor": {"every": 4},
        "compressive": {"segment": 3, "memory": 3, "compressed": 2, "rate": 2},
    }
    recipe = RELATIVE | ({} if memory is None else {"memory": {"method": memory, **sizes[memory]}})
    model = placed(family, recipe)
    batch = inputs(model, length=LENGTH)
    whole = logits(model, **batch, use_cache=False)
    assert whole.isfinite().all()
    for chunks in CHUNKS.values():
        assert (stepwise(model, chunks, **batch)[0] - whole).abs().max() <= EXACT


@pytest.mark.parametrize("family", PLACED)
def test_unlimited_memory_is_full_attention(family: str) -> None:
    batch = inputs(tiny(family), length=LENGTH)
    full = logits(placed(family), **batch, use_cache=False)
    model = placed(family, RELATIVE | {"memory": {"method": "segment_recurrence", "segment": 5, "memory": LENGTH}})
    assert (logits(model, **batch, use_cache=False) - full).abs().max() <= EXACT
    assert (stepwise(model, [5, 5, 5, 5, 4], **batch)[0] - full).abs().max() <= EXACT


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize("memory", [0, 3, 8])
def test_limited_memory_is_the_mask_from_the_segments_border(family: str, memory: int) -> None:
    rows = [[i // 4 * 4 - memory <= j <= i for j in range(LENGTH)] for i in range(LENGTH)]
    batch = inputs(tiny(family), length=LENGTH)
    mask = torch.tensor(rows)[None, None]
    masked = logits(placed(family), **batch | {"attention_mask": mask}, use_cache=False)
    model = placed(family, RELATIVE | {"memory": {"method": "segment_recurrence", "segment": 4, "memory": memory}})
    assert (logits(model, **batch, use_cache=False) - masked).abs().max() <= EXACT
    assert (stepwise(model, [4] * 6, **batch)[0] - masked).abs().max() <= EXACT


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("recipe", [RELATIVE, RELATIVE | RECURRENCE], ids=["full", "recurrence"])
@pytest.mark.parametrize("chunks", [[LENGTH], *CHUNKS.values()], ids=["one pass", *CHUNKS])
def test_left_padded_rows_equal_the_rows_alone(family: str, recipe: dict, chunks: list[int]) -> None:
    model, pads = placed(family, recipe), 6
    batch = inputs(model, length=LENGTH)
    alone = logits(model, input_ids=batch["input_ids"][1:, pads:], use_cache=False)
    batch["attention_mask"][1, :pads] = 0
    together, _ = stepwise(model, chunks, **batch)
    assert (together[1:, pads:] - alone).abs().max() <= EXACT


@pytest.mark.parametrize("recipe", [RELATIVE, RELATIVE | RECURRENCE], ids=["full", "recurrence"])
def test_packed_sequences_equal_the_sequences_alone(recipe: dict) -> None:
    model = placed("llama", recipe)
    ids = inputs(model, batch=1, length=LENGTH)["input_ids"]
    places = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    packed = logits(model, input_ids=ids, position_ids=places, use_cache=False)
    apart = [logits(model, input_ids=sequence, use_cache=False) for sequence in (ids[:, :9], ids[:, 9:])]
    assert (packed - torch.cat(apart, 1)).abs().max() <= EXACT


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beams", "static"])
def test_generate(family: str, options: dict) -> None:
    model = placed(family, dtype=torch.float32)
    batch = {name: tensor for name, tensor in padded_inputs(model).items() if name != "decoder_input_ids"}
    fixed = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    plain = {name: value for name, value in options.items() if name != "cache_implementation"}
    expected = model.generate(**batch, **fixed, **plain, use_cache=False)
    assert torch.equal(model.generate(**batch, **fixed, **options), expected)


@pytest.mark.parametrize("clamp", [1, 5])
def test_beyond_the_clamp_all_distances_are_one(clamp: int) -> None:
    model = placed("llama", {"attention": {"method": "relative", "clamp": clamp}}, num_hidden_layers=1)
    batch = inputs(model, batch=1, length=LENGTH)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    far = LENGTH - 1 - clamp  # The last token sees these at the clamp and beyond.
    other["input_ids"][:, : far + 1] = other["input_ids"][:, : far + 1].flip(1)
    assert (logits(model, **batch) - logits(model, **other))[:, -1].abs().max() <= EXACT
    free = placed("llama", num_hidden_layers=1)
    assert (logits(free, **batch) - logits(free, **other))[:, -1].abs().max() > 1e-3


def test_mixed_precision_agrees() -> None:
    model = placed("llama", dtype=torch.float32)
    batch = padded_inputs(model, length=LENGTH)
    whole = logits(model, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, **batch)
    assert (mixed.float() - whole).norm() <= 0.05 * whole.norm()


# Plans -----------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TautError, match="relative position bias"):
        taut.apply(tiny("t5"), RELATIVE)
    with pytest.raises(TautError, match="softcap|caps its attention"):
        taut.apply(tiny("gemma2"), RELATIVE)
    with pytest.raises(TautError, match=r"attention\.relative removes .* whole stack.* \(layers 1 lack it\)"):
        taut.apply(tiny("llama"), {"attention": {"method": "relative", "layers": "0"}})
    with pytest.raises(TautError, match=r"layers 2 lack it"):
        taut.apply(tiny("bart"), {"attention": {"method": "relative", "layers": "0:2"}})
    with pytest.raises(TautError, match="clamp = 0"):
        taut.apply(tiny("llama"), {"attention": {"method": "relative", "clamp": 0}})
    with pytest.raises(TautError, match=r"list, not cosines and sines"):
        unturned(nn.Identity(), (), [1, 2])


def test_a_refused_model_is_as_it_was() -> None:
    model = tiny("llama")
    with pytest.raises(TautError):
        taut.apply(model, {"attention": {"method": "relative", "layers": "0"}})
    assert torch.equal(logits(model, **inputs(model)), logits(tiny("llama"), **inputs(model)))


def test_a_cache_without_positions_is_refused() -> None:
    model = placed("llama", RELATIVE | {"memory": {"method": "key_norm", "entries": 6}})
    with pytest.raises(TautError, match="relative"):
        stepwise(model, [14, 1], input_ids=inputs(model, length=LENGTH)["input_ids"])


def test_where_positions_enter_must_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("gpt2", "llama", "gemma3", "bart"):
        model = tiny(family, device="meta")
        positions = [site.positions for site in locate(model).in_slot("attention")]
        assert all(positions)
        with monkeypatch.context() as patch:
            patch.setattr("taut.architectures.locate.FAMILIES", {})
            assert [site.positions for site in locate(model).in_slot("attention")] == positions
    site = AttentionSite(
        slot="attention", path="x", heads=2, key_heads=2, head_width=8, causal=True, position="rope", length=8
    )
    assert "it is unknown where" in Relative().fits(site)


def test_a_plan_says_that_training_comes_first() -> None:
    model = tiny("llama")
    plan = taut.plan(model, RELATIVE)
    assert all("trained weights do not fit" in step.note and "rope" in step.note for step in plan.steps)


# Transformer-XL --------------------------------------------------------------------------------------------------


def test_transformer_xl_from_scratch(tmp_path: Path) -> None:
    recipe = RELATIVE | {"memory": {"method": "segment_recurrence", "segment": 16, "memory": 16}}
    changes = {"budget": {"steps": 30}, "learning_rate": 1e-2, "evaluate": {"every": 1.0}, "save": {"steps": 2}}
    spec = small(tmp_path, recipe=recipe, carry_memory=True, **changes)
    whole = train(spec, tmp_path / "whole")
    assert whole.record["losses"][-1] < 0.6 * whole.record["losses"][0]
    with pytest.raises(Cut):
        train(spec, tmp_path / "out", progress=cut_at(5))
    assert train(spec, tmp_path / "out").record["losses"] == whole.record["losses"]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    learned = [tensor for name, tensor in model.named_parameters() if f".{LEARNED}." in name]
    # The start was 0.02, and each layer's its own.
    assert len(learned) == 6
    assert all(float(tensor.detach().std()) > 0.022 for tensor in learned)
    ids = torch.arange(10, 58)[None]
    assert (stepwise(model, [16, 1, 31], input_ids=ids)[0] - logits(model, input_ids=ids)).abs().max() <= 1e-4
