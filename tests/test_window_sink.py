"""memory.window_sink: bounded, with true positions, whatever way the tokens come in."""

import pytest
import torch
from decoding import CHUNKS, LENGTH, install
from transformers import DynamicCache, PreTrainedModel

from taut.architectures.locate import locate
from taut.contract.tiny import inputs, logits, padded_inputs, stepwise, tiny
from taut.core.errors import TautError
from taut.core.site import AttentionSite, MemorySite
from taut.methods.attention.local_global import LocalGlobal
from taut.methods.memory.identity import Identity
from taut.methods.memory.window_sink import WindowSink
from taut.ops.attention import blocked
from taut.ops.caches.ring import Ring
from taut.surgery.attention import install_attention

SINKS, WINDOW = 2, 5
METHOD = WindowSink.parse({"sinks": SINKS, "window": WINDOW})


def _install(model: PreTrainedModel, method: WindowSink | Identity = METHOD):
    return install(model, method)


def _local(model: PreTrainedModel, window: int):
    method = LocalGlobal.parse({"window": window, "global_tokens": 1})
    sites = [site for site in locate(model).sites if isinstance(site, AttentionSite)]
    return install_attention(model, {site.path: (method, site) for site in sites})


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 4), (2, 3), (3, 1)])
def test_ring_is_the_cache_it_stands_for(sinks: int, window: int) -> None:
    ring = Ring(sinks, window)
    columns: dict[int, int] = {}
    for position in range(20):
        columns[int(ring.column(torch.tensor(position)))] = position
        count = position + 1
        visible = {j for j in range(count) if j < sinks or position - j < window}
        held = ring.held(torch.tensor([count]), ring.capacity)[0].tolist()
        assert {column: place for column, place in enumerate(held) if place >= 0} == columns
        assert visible <= set(columns.values())
        assert len(columns) == min(count, ring.capacity)


def test_holes_in_the_mask_stay_hidden() -> None:
    model = tiny("llama", dtype=torch.float64)
    _install(model)
    batch = inputs(model, length=LENGTH)
    batch["attention_mask"][0, [1, 8, 20]] = 0
    changed = batch["input_ids"].clone()
    changed[batch["attention_mask"] == 0] = 7
    real = batch["attention_mask"].bool()
    one, _ = stepwise(model, CHUNKS["long prompt"], **batch)
    two, _ = stepwise(model, CHUNKS["long prompt"], **batch | {"input_ids": changed})
    assert (one - two)[real].abs().max() <= 1e-12


def test_a_returned_cache_goes_on() -> None:
    model = tiny("llama")
    _install(model)
    batch = inputs(model, batch=1)
    whole = model.generate(**batch, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    first = model.generate(**batch, **options)
    second = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=10, do_sample=False)
    assert torch.equal(second, whole[:, : second.shape[1]])


def test_crop_equals_never_having_seen() -> None:
    model = tiny("llama", dtype=torch.float64)
    _install(model)
    ids = inputs(model, length=LENGTH)["input_ids"]
    wrong = torch.cat([ids[:, :14], (ids[:, 14:18] + 1) % 90, ids[:, 14:]], 1)
    cache = METHOD.cache(2)
    cache.activate_past_recording()
    _, cache = stepwise(model, [10, 8], cache, input_ids=wrong[:, :18])
    cache.crop(-4)
    assert cache.get_seq_length() == 14
    assert cache.layers[0].keys.shape[2] == SINKS + WINDOW
    rest, _ = stepwise(model, [1, 9], cache, input_ids=ids[:, 14:])
    assert (rest - logits(model, input_ids=ids, use_cache=False)[:, 14:]).abs().max() <= 1e-12


def test_crop_before_anything_was_dropped() -> None:
    model = tiny("llama", dtype=torch.float64)
    _install(model)
    ids = inputs(model, length=12)["input_ids"]
    _, cache = stepwise(model, [6], input_ids=ids[:, :6])
    cache.crop(-3)
    rest, _ = stepwise(model, [1, 8], cache, input_ids=ids[:, 3:])
    assert (rest - logits(model, input_ids=ids, use_cache=False)[:, 3:]).abs().max() <= 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("window", [3, 8])
def test_composes_with_local_attention(family: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CPU_ROWS", 4)
    model = tiny(family, dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    undo_local = _local(model, window)
    local = logits(model, **batch, use_cache=False)
    undo = _install(model)
    both = logits(model, **batch, use_cache=False)
    assert torch.allclose(local, both, atol=1e-12) == (window <= WINDOW)
    for chunks in CHUNKS.values():
        steps, _ = stepwise(model, chunks, **batch)
        assert (steps - both).abs().max() <= 1e-12
    undo_local()
    assert model.config._attn_implementation == "taut"
    undo()
    assert model.config._attn_implementation == "sdpa"


def test_a_window_as_long_as_the_text_is_the_original() -> None:
    model = tiny("llama", dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    before = logits(model, **batch)
    _install(model, WindowSink.parse({"sinks": 0, "window": LENGTH}))
    assert (logits(model, **batch) - before).abs().max() <= 1e-12
    assert (stepwise(model, CHUNKS["growing"], **batch)[0] - before).abs().max() <= 1e-12


def test_future_changes_nothing_to_the_bit() -> None:
    model = tiny("llama")
    _install(model)
    ids = inputs(model, length=LENGTH)["input_ids"]
    later = ids.clone()
    later[:, 15:] = 9
    assert torch.equal(logits(model, input_ids=ids)[:, :15], logits(model, input_ids=later)[:, :15])


def test_packed_sequences_have_sinks_of_theirown() -> None:
    model = tiny("llama", dtype=torch.float64)
    _install(model)
    ids = inputs(model, batch=1, length=LENGTH)["input_ids"]
    places = torch.cat([torch.arange(11), torch.arange(13)])[None]
    packed = logits(model, input_ids=ids, position_ids=places, use_cache=False)
    apart = torch.cat([logits(model, input_ids=part) for part in (ids[:, :11], ids[:, 11:])], 1)
    assert (packed - apart).abs().max() <= 1e-12


def test_inference_mode_and_back() -> None:
    model = tiny("llama")
    _install(model)
    ids = inputs(model, length=12)["input_ids"]
    with torch.inference_mode():
        past = model(input_ids=ids[:, :11], use_cache=True)["past_key_values"]
    with torch.no_grad():
        step = model(input_ids=ids[:, 11:], past_key_values=past)["logits"]
    assert torch.allclose(step, logits(model, input_ids=ids)[:, 11:], atol=1e-4)


def test_what_cannot_be_served_is_told() -> None:
    model = tiny("llama")
    batch = inputs(model)
    filled = model(**batch, past_key_values=DynamicCache())["past_key_values"]
    _install(model)
    with pytest.raises(TautError, match="already holds 12 tokens"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=filled)
    with pytest.raises(TautError, match="StaticCache"):
        model.generate(**batch, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(TautError, match="of 4 axes"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))
    padded = padded_inputs(model)
    past = model(**padded, use_cache=True)["past_key_values"]
    with pytest.raises(TautError, match="left-padded"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=past)
    with pytest.raises(TautError, match="serves only the model"):
        tiny("llama")(**batch, past_key_values=METHOD.cache(2))


def test_cost_and_keep() -> None:
    site = MemorySite(
        slot="memory", path="model", layers=2, key_heads=2, head_width=8, position="rope", length=100, dtype="float32"
    )
    assert METHOD.entries(site) == 7
    assert METHOD.predict(site).cache_bytes_per_token == site.dense().cache_bytes_per_token * 0.07
    assert WindowSink.parse({}, 0.5).solve(site, 0.5).knobs.window == 46
    assert WindowSink.parse({"sinks": 0}, 1.0).solve(site, 1.0).entries(site) == 100
    assert Identity().predict(site) == site.dense()
    with pytest.raises(TautError, match="the least keep is 0.0500"):
        WindowSink.parse({}, 0.03).solve(site, 0.03)


def test_identity_leaves_the_model_alone() -> None:
    model = tiny("llama")
    _install(model, Identity())()
    assert model.config._attn_implementation == "sdpa"
    assert not model.model._forward_pre_hooks
