"""memory.segment_recurrence: what the segment and its memory allow, whatever way the tokens come in."""

import json
from pathlib import Path

import pytest
import torch
from decoding import CHUNKS, LENGTH, install, own
from slow_memory import slowly
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import taut
from taut.contract.tiny import inputs, logits, stepwise, tiny
from taut.core.errors import TautError
from taut.core.site import MemorySite
from taut.methods.memory.segment_recurrence.mask import Recurrence
from taut.methods.memory.segment_recurrence.method import SegmentRecurrence
from taut.ops.attention import blocked
from taut.ops.attention.masks import View

SEGMENT, MEMORY = 4, 3
METHOD = SegmentRecurrence.parse({"segment": SEGMENT, "memory": MEMORY})


def method(segment: int, memory: int) -> SegmentRecurrence:
    return SegmentRecurrence.parse({"segment": segment, "memory": memory})


def explicit(length: int, segment: int, memory: int) -> Tensor:
    """(1, 1, length, length) bool, entry by entry."""
    rows = [[i // segment * segment - memory <= j <= i for j in range(length)] for i in range(length)]
    return torch.tensor(rows)[None, None]


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_in_few_bits_one_pass_is_the_rounding_and_steps_are(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    stored = SegmentRecurrence.parse({"segment": SEGMENT, "memory": MEMORY, "store": {"method": "low_bit"}})
    places = torch.arange(LENGTH)

    def rule(query: Tensor, key: Tensor, scaling: float) -> Tensor:
        return stored.pattern().allowed(places, places)[None, None]

    with slowly(model, rule, stored.store):
        expected = logits(model, **batch, use_cache=False)
    install(model, stored)
    assert (logits(model, **batch, use_cache=False) - expected).abs().max() <= 1e-12
    steps, past = stepwise(model, CHUNKS["in pieces"], **batch)
    assert (steps - expected).abs().max() <= 1e-12
    assert all(layer.keys.dtype == torch.uint8 for layer in own(past).layers)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3", "t5"])
@pytest.mark.parametrize("memory", [0, 4, 8, 12])
def test_equals_the_model_under_the_explicit_mask(family: str, memory: int) -> None:
    model = tiny(family, dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    name = "decoder_attention_mask" if model.config.is_encoder_decoder else "attention_mask"
    masked = logits(model, **batch | {name: explicit(LENGTH, SEGMENT, memory)}, use_cache=False)
    install(model, method(SEGMENT, memory))
    assert (logits(model, **batch, use_cache=False) - masked).abs().max() <= 1e-12
    assert (stepwise(model, CHUNKS["in pieces"], **batch)[0] - masked).abs().max() <= 1e-12


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("segment", [1, 7])
def test_unlimited_memory_is_full_attention(depth: int, segment: int) -> None:
    model = tiny("llama", dtype=torch.float64, num_hidden_layers=depth)
    batch = inputs(model, length=LENGTH)
    full = logits(model, **batch, use_cache=False)
    install(model, method(segment, LENGTH))
    assert (logits(model, **batch, use_cache=False) - full).abs().max() <= 1e-12
    for chunks in CHUNKS.values():
        assert (stepwise(model, chunks, **batch)[0] - full).abs().max() <= 1e-12


def test_positions_counted_in_the_cache_would_be_wrong() -> None:
    model = tiny("llama", dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    install(model, METHOD)
    whole = logits(model, **batch, use_cache=False)
    shifted = batch | {"position_ids": (torch.arange(LENGTH) % (SEGMENT + MEMORY)).expand(2, -1)}
    assert (stepwise(model, [1] * LENGTH, **shifted)[0] - whole).abs().max() > 1e-2


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_reach_grows_as_layers_times_segment(layers: int) -> None:
    segment, segments = 8, 8
    model = tiny("llama", dtype=torch.float64, num_hidden_layers=layers)
    install(model, method(segment, segment))
    ids = inputs(model, batch=1, length=segment * segments)["input_ids"]
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False)["logits"][0, -1].square().sum().backward()
    reached = embeddings.grad[0].abs().sum(1) > 0
    assert int(reached.sum()) == (layers + 1) * segment
    assert bool(reached[-(layers + 1) * segment :].all())


def test_crop_over_a_border_equals_never_having_seen() -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, METHOD)
    ids = inputs(model, length=LENGTH)["input_ids"]
    wrong = torch.cat([ids[:, :14], (ids[:, 14:18] + 1) % 90], 1)
    cache = METHOD.cache(2)
    cache.activate_past_recording()
    _, cache = stepwise(model, [10, 8], cache, input_ids=wrong)
    cache.crop(-4)
    rest, _ = stepwise(model, [1, 9], cache, input_ids=ids[:, 14:])
    assert (rest - logits(model, input_ids=ids, use_cache=False)[:, 14:]).abs().max() <= 1e-12


def test_memory_may_be_longer_where_the_model_is_used(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    masked = logits(model, **batch | {"attention_mask": explicit(LENGTH, SEGMENT, 11)}, use_cache=False)
    taut.apply(model, {"memory": {"method": "segment_recurrence", "segment": SEGMENT, "memory": MEMORY}})
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    assert json.loads(config)["quantization_config"]
    (tmp_path / "config.json").write_text(config.replace(f'"memory": {MEMORY}', '"memory": 11'))
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (logits(again, **batch, use_cache=False) - masked).abs().max() <= 1e-12
    assert (stepwise(again, CHUNKS["growing"], **batch)[0] - masked).abs().max() <= 1e-12


@pytest.mark.parametrize(("segment", "memory"), [(8, 5), (16, 0), (3, 20)])
@pytest.mark.parametrize("pads", [0, 9])
def test_long_text_goes_through_the_block_kernel(
    segment: int, memory: int, pads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocked, "CPU_ROWS", 16)
    model = tiny("llama", dtype=torch.float64)
    batch = inputs(model, length=120)
    batch["attention_mask"][1, :pads] = 0
    install(model, method(segment, memory))
    calls = []
    attend = blocked.attend
    monkeypatch.setattr(blocked, "attend", lambda *args, **named: calls.append(args) or attend(*args, **named))
    whole = logits(model, **batch, use_cache=False)
    assert len(calls) == 2
    pattern = Recurrence(segment, memory)
    monkeypatch.setattr(Recurrence, "band", None)
    dense = logits(model, **batch, use_cache=False)
    real = batch["attention_mask"].bool()
    assert len(calls) == 2
    assert (whole - dense)[real].abs().max() <= 1e-12
    assert View(1, 120, 120, causal=True, pattern=pattern).dense(torch.device("cpu")).sum() == pattern.pairs(120)


def test_blocks_share_masks() -> None:
    model = tiny("llama", max_position_embeddings=4096)
    install(model, method(64, 64))
    seen: list[View] = []
    attend = blocked.attend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked, "attend", lambda *args, **named: seen.append(args[3]) or attend(*args, **named))
        logits(model, **inputs(model, batch=1, length=2048), use_cache=False)
    assert seen[0] is seen[1]
    assert len(seen[0].memo) <= 8  # Of 32 blocks.


def _gradients(model: PreTrainedModel, ids: Tensor, cuts: tuple[int, ...], detach: bool) -> dict[str, Tensor]:
    """Gradients of <logits, fixed random> when the text comes in pieces with carried memory."""
    direction = torch.randn(*ids.shape, model.config.vocab_size, generator=torch.Generator().manual_seed(1)).double()
    model.zero_grad()
    past, total, start = None, 0.0, 0
    for stop in cuts:
        output = model(input_ids=ids[:, start:stop], past_key_values=past, use_cache=True)
        past, total = output["past_key_values"], total + (output["logits"] * direction[:, start:stop]).sum()
        start = stop
        if detach:
            past.detach()
            assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in past.layers)
    total.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradients_end_where_the_memory_is_detached() -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, METHOD)
    ids = inputs(model, length=12)["input_ids"]
    whole = _gradients(model, ids, (12,), False)
    joined = _gradients(model, ids, (4, 8, 12), False)
    apart = _gradients(model, ids, (4, 8, 12), True)
    assert all(torch.allclose(joined[name], whole[name], atol=1e-9, rtol=0) for name in whole)
    assert max((apart[name] - whole[name]).abs().max() for name in whole) > 1e-2


def test_cost_and_keep() -> None:
    site = MemorySite(slot="memory", path="model", layers=2, key_heads=2, head_width=8, position="rope", length=100)
    assert METHOD.entries(site) == 7
    assert METHOD.predict(site).cache_bytes_per_token == site.dense().cache_bytes_per_token * 0.07
    general = SegmentRecurrence.parse({"segment": 10}, 0.5)
    assert general.solve(site, 0.5).knobs.memory == 40
    assert general.solve(site, 0.1).knobs.memory == 0
    with pytest.raises(TautError, match=r"the least keep is 0\.1000"):
        general.solve(site, 0.09)
    with pytest.raises(TautError, match="segment = 0"):
        method(0, 4)
