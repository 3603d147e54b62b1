"""attention.local_global and the plug: exact, causal, padded, cached, trained, and gone again to the bit."""

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from taut import plan
from taut.architectures.locate import locate
from taut.contract.tiny import FAMILIES, inputs, logits, padded_inputs, tiny
from taut.core.errors import TautError
from taut.core.site import AttentionSite
from taut.methods.attention.identity import Identity
from taut.methods.attention.local_global import LocalGlobal
from taut.methods.base import AttentionMethod
from taut.ops.attention import blocked
from taut.ops.attention.masks import Sink, View
from taut.surgery.attention import install_attention

CPU = torch.device("cpu")
FUSED = [name for name, family in FAMILIES.items() if family.attention == "sdpa"]
DECODERS = [name for name in FUSED if FAMILIES[name].decoder]
WHOLE = slice(None)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny inputs then have several blocks too."""
    monkeypatch.setattr(blocked, "CPU_ROWS", 4)


def _install(model: PreTrainedModel, method: AttentionMethod):
    sites = [site for site in locate(model).sites if isinstance(site, AttentionSite)]
    return install_attention(model, {site.path: (method, site) for site in sites})


def _site(causal: bool, length: int, **more) -> AttentionSite:
    shape = {"heads": 2, "key_heads": 2, "head_width": 8, "position": "rope"}
    return AttentionSite(slot="attention", path="x", causal=causal, length=length, **shape, **more)


# The kernel ----------------------------------------------------------------------------------------------------------


def _padding(kind: str, length: int) -> tuple[Tensor | None, Tensor | None]:
    padding = torch.ones(2, length, dtype=torch.bool)
    if kind == "left":
        padding[1, :7] = False
        return padding, torch.tensor([0, 7])
    if kind == "right":
        padding[1, -7:] = False
        return padding, None
    return None, None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize(("window", "first"), [(1, 0), (5, 0), (5, 2), (17, 3), (90, 2)])
@pytest.mark.parametrize("groups", [1, 3])
def test_kernel_is_the_formula(causal: bool, padding: str, window: int, first: int, groups: int) -> None:
    torch.manual_seed(0)
    length = 45
    real, starts = _padding(padding, length)
    query = torch.randn(2, 2 * groups, length, 6, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 2, length, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    bias = torch.randn(1, 2 * groups, length, length, dtype=torch.float64, requires_grad=True)
    view = View(2, length, length, causal=causal, padding=real, starts=starts)
    allowed = view.block(WHOLE, WHOLE, CPU, blocked.local(window, first, causal))
    seen = allowed.any(-1)[:, 0, :, None, None]
    for extra in (None, bias):
        ours = blocked.attend(query, key, value, view, window=window, first=first, position_bias=extra, rows=8)
        formula = blocked.reference(query, key, value, allowed, position_bias=extra)
        assert ours.isfinite().all()
        assert (ours - formula).mul(seen).abs().max() <= 1e-12
        with torch.no_grad():
            inferred = blocked.attend(query, key, value, view, window=window, first=first, position_bias=extra, rows=8)
        assert (inferred - ours).abs().max() <= 1e-12
        leaves = [query, key, value] + ([bias] if extra is not None else [])
        direction = torch.randn(ours.shape, dtype=torch.float64) * seen
        gradients, expected = (torch.autograd.grad((out * direction).sum(), leaves) for out in (ours, formula))
        assert all((a - b).abs().max() <= 1e-12 for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize(("queries", "past"), [(1, 40), (3, 40), (20, 9)])
@pytest.mark.parametrize("first", [0, 2])
def test_kernel_decodes_from_a_cache(queries: int, past: int, first: int) -> None:
    torch.manual_seed(0)
    keys = queries + past
    query = torch.randn(1, 2, queries, 6, dtype=torch.float64)
    key, value = (torch.randn(1, 2, keys, 6, dtype=torch.float64) for _ in range(2))
    view = View(1, queries, keys, query_start=past, causal=True)
    ours = blocked.attend(query, key, value, view, window=6, first=first, rows=8)
    allowed = view.block(WHOLE, WHOLE, CPU, Sink(first, 6))
    assert (ours - blocked.reference(query, key, value, allowed)).abs().max() <= 1e-12


def test_kernel_obeys_memory_and_rule() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 50, 6, dtype=torch.float64) for _ in range(3))
    for pattern, rule in ((Sink(3, 9), None), (None, lambda b, h, q, k: (k <= q) & (q // 11 == k // 11))):
        view = View(2, 50, 50, causal=True, pattern=pattern, rule=rule)
        ours = blocked.attend(query, key, value, view, window=14, first=5, rows=8)
        allowed = view.block(WHOLE, WHOLE, CPU, Sink(5, 14))
        assert (ours - blocked.reference(query, key, value, allowed)).abs().max() <= 1e-12


def test_future_changes_nothing_to_the_bit() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 200, 8) for _ in range(3))
    later = [tensor.clone() for tensor in (query, key, value)]
    for tensor in later:
        tensor[:, :, 130:] = 50.0
    view = View(1, 200, 200, causal=True)
    before, after = (blocked.attend(*tensors, view, window=20, first=1) for tensors in ((query, key, value), later))
    assert torch.equal(before[:, :130], after[:, :130])


def test_masks_are_shared() -> None:
    """Blocks far from the start and all layers use one mask: its number does not grow with the length."""
    counts = []
    for length in (400, 800):
        query, key, value = (torch.randn(1, 1, length, 4) for _ in range(3))
        view = View(1, length, length, causal=True)
        for _ in range(2):
            blocked.attend(query, key, value, view, window=32, first=1, rows=16)
        counts.append(len(view.memo))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "window", "first"), [(300, 64, 1), (300, 64, 0), (200, 16, 5), (90, 100, 1)])
def test_predicted_flops_are_what_the_kernel_computes(causal: bool, length: int, window: int, first: int) -> None:
    site = _site(causal, length)
    method = LocalGlobal.parse({"window": window, "global_tokens": first})
    query, key, value = (torch.randn(1, 2, length, 8) for _ in range(3))

    def count(q: tuple, k: tuple, *_: object, **__: object) -> int:
        return 4 * q[0] * q[1] * q[2] * q[3] * k[2]

    # PyTorch counts the fused kernels of accelerators, not the CPU's.
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        method.attend(torch.nn.Identity(), query, key, value, View(1, length, length, causal=causal))
    assert counter.get_total_flops() == pytest.approx(method.predict(site).flops_per_token * length)
    assert method.predict(site).flops_per_token <= site.dense().flops_per_token


# The knobs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_counted(causal: bool) -> None:
    for length in (1, 9, 40):
        for window, first in ((1, 0), (5, 0), (5, 2), (12, 3), (60, 2), (2, 60)):
            method = LocalGlobal.parse({"window": window, "global_tokens": first})
            positions = torch.arange(length)
            mask = blocked.local(window, first, causal).allowed(positions, positions)
            assert method.pairs(_site(causal, length)) == int(mask.sum())


@pytest.mark.parametrize("causal", [True, False])
def test_keep_gives_the_largest_window(causal: bool) -> None:
    site = _site(causal, 100)
    dense = 5050 if causal else 10000
    for keep in (0.1, 0.33, 0.8):
        method = LocalGlobal.parse({}, keep).solve(site, keep)
        larger = LocalGlobal.parse({"window": method.knobs.window + 1})
        assert method.pairs(site) <= keep * dense < larger.pairs(site)
    assert LocalGlobal.parse({}, 1.0).solve(site, 1.0).knobs.window == 100


def test_wrong_knobs_are_told() -> None:
    with pytest.raises(TautError, match="did you mean 'window'"):
        LocalGlobal.parse({"windw": 3})
    with pytest.raises(TautError, match="window"):
        LocalGlobal.parse({"window": 0})
    with pytest.raises(TautError, match="least keep is 0.0"):
        LocalGlobal.parse({}, 0.001).solve(_site(True, 100), 0.001)
    assert "caps" in LocalGlobal.parse({}).fits(_site(True, 8, softcap=30.0))


# In a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FUSED)
def test_identity_is_sdpa_to_the_bit(family: str) -> None:
    model = tiny(family)
    batches = [inputs(model), padded_inputs(model)]
    before = [logits(model, **batch) for batch in batches]
    undo = _install(model, Identity())
    assert model.config._attn_implementation == "taut"
    assert all(torch.equal(a, logits(model, **batch)) for a, batch in zip(before, batches, strict=True))
    undo()
    assert model.config._attn_implementation == "sdpa"
    assert not any("taut_attention" in vars(module) for module in model.modules())
    assert all(torch.equal(a, logits(model, **batch)) for a, batch in zip(before, batches, strict=True))


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "t5"])
@pytest.mark.parametrize("static", [False, True])
def test_identity_generates_to_the_bit(family: str, static: bool) -> None:
    model = tiny(family)
    batch = {name: tensor for name, tensor in padded_inputs(model).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    options |= {"cache_implementation": "static"} if static else {}
    before = model.generate(**batch, **options)
    _install(model, Identity())
    after = model.generate(**batch, **options)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))


@pytest.mark.parametrize("family", FUSED)
def test_a_wide_window_is_the_original(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    batch = padded_inputs(model)
    real = batch["attention_mask"].bool()
    before = logits(model, **batch)
    _install(model, LocalGlobal.parse({"window": 12}))
    wide = logits(model, **batch)
    if not model.config.is_encoder_decoder:
        before, wide = before[real], wide[real]
    assert (before - wide).abs().max() <= 1e-12


@pytest.mark.parametrize("family", DECODERS)
def test_steps_equal_one_pass_and_the_single_row(family: str, small_blocks: None) -> None:
    model = tiny(family, dtype=torch.float64)
    batch = inputs(model, length=24)
    before = logits(model, **batch)
    _install(model, LocalGlobal.parse({"window": 4, "global_tokens": 1}))
    whole = logits(model, **batch, use_cache=False)
    assert not torch.allclose(before, whole, atol=1e-3)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    ids, mask = batch.pop(key), batch.get("attention_mask")
    past, pieces, start = None, [], 0
    with torch.no_grad():
        for count in (10, 1, 1, 5, *[1] * 7):
            stop = start + count
            if key == "input_ids":
                batch["attention_mask"] = mask[:, :stop]
            output = model(**batch, **{key: ids[:, start:stop]}, past_key_values=past, use_cache=True)
            past, start = output["past_key_values"], stop
            pieces.append(output["logits"])
    assert (torch.cat(pieces, 1) - whole).abs().max() <= 1e-12
    if key == "input_ids":
        mask[1, :9] = 0
        places = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = logits(model, input_ids=ids, attention_mask=mask, position_ids=places)
        alone = logits(model, input_ids=ids[1:, 9:])
        assert (padded[1:, 9:] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart", "t5"])
def test_generation_with_and_without_cache_agrees(family: str, small_blocks: None) -> None:
    model = tiny(family)
    _install(model, LocalGlobal.parse({"window": 4}))
    batch = {name: tensor for name, tensor in padded_inputs(model).items() if name != "decoder_input_ids"}
    for beams in (1, 3):
        options = {"max_new_tokens": 10, "do_sample": False, "num_beams": beams}
        assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


def test_packed_sequences_stay_apart(small_blocks: None) -> None:
    model = tiny("llama", dtype=torch.float64)
    ids = inputs(model, batch=1, length=20)["input_ids"]
    places = torch.cat([torch.arange(9), torch.arange(11)])[None]
    for first in (0, 2):
        undo = _install(model, LocalGlobal.parse({"window": 3, "global_tokens": first}))
        packed = logits(model, input_ids=ids, position_ids=places, use_cache=False)
        apart = torch.cat([logits(model, input_ids=part) for part in (ids[:, :9], ids[:, 9:])], 1)
        assert (packed - apart).abs().max() <= 1e-12
        undo()


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_gradients_are_those_of_the_dense_mask(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    batch = inputs(model, length=20)
    _install(model, LocalGlobal.parse({"window": 4, "global_tokens": 1}))
    gradients = []
    for rows in (4, 64):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocked, "CPU_ROWS", rows)
            model.zero_grad()
            output = model(**batch, use_cache=False)[0]
            (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        gradients.append(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    assert all((gradients[0][name] - gradients[1][name]).abs().max() <= 1e-9 for name in gradients[0])
    assert sum(bool(gradient.any()) for gradient in gradients[0].values()) >= 0.8 * len(gradients[0])


def test_a_mask_of_the_callers_own_is_obeyed() -> None:
    model = tiny("bert", dtype=torch.float64)
    batch = padded_inputs(model)
    four = batch["attention_mask"].bool()[:, None, None, :].expand(2, 1, 12, 12)
    _install(model, LocalGlobal.parse({"window": 3}))
    two = logits(model, **batch)
    batch["attention_mask"] = four
    assert (logits(model, **batch) - two)[batch["input_ids"] != 0].abs().max() <= 1e-12


def test_copies_and_files(tmp_path: Path) -> None:
    model = tiny("llama")
    batch = inputs(model)
    undo = _install(model, LocalGlobal.parse({"window": 3}))
    after = logits(model, **batch)
    assert torch.equal(logits(copy.deepcopy(model), **batch), after)
    model.save_pretrained(tmp_path)
    assert "taut" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    undo()
    assert not torch.equal(logits(model, **batch), after)


def test_a_capped_model_is_refused() -> None:
    model = tiny("gemma2")
    with pytest.raises(TautError, match="caps its attention scores"):
        plan(model, {"attention": {"method": "local_global", "window": 4}})
    if not model._supports_sdpa:
        with pytest.raises(TautError, match="does not support fused attention"):
            install_attention(model, {})
    assert model.config._attn_implementation == "eager"
