"""The sites of every family: the right modules, the right shapes, nothing lost; unknown families probed or refused."""

import inspect
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from taut.architectures.families import FAMILIES
from taut.architectures.locate import locate
from taut.architectures.skeleton import skeleton
from taut.contract import tiny
from taut.core.errors import TautError
from taut.core.site import AttentionSite, LinearSite, MemorySite, TableSite

PLAIN = ("q", "k", "v", "o", "up", "down")
GATED = ("q", "k", "v", "o", "gate", "up", "down")
FUSED = ("qkv", "o", "up", "down")
CROSS = ("cross_q", "cross_k", "cross_v", "cross_o")

# family: the roles of one layer of each stack, and how many modules share the table (copies, heads).
EXPECTED = {
    "bert": ({"": PLAIN}, 0, 1),
    "roberta": ({"": PLAIN}, 0, 1),
    "distilbert": ({"": PLAIN}, 0, 1),
    "gpt2": ({"": FUSED}, 0, 1),
    "gpt_neox": ({"": FUSED}, 0, 0),
    "llama": ({"": GATED}, 0, 1),
    "llama_untied": ({"": GATED}, 0, 0),
    "mistral": ({"": GATED}, 0, 0),
    "qwen2": ({"": GATED}, 0, 1),
    "qwen3": ({"": GATED}, 0, 1),
    "gemma": ({"": GATED}, 0, 1),
    "gemma2": ({"": GATED}, 0, 1),
    "gemma3": ({"": GATED}, 0, 1),
    "bart": ({"encoder": PLAIN, "decoder": ("q", "k", "v", "o", *CROSS, "up", "down")}, 2, 1),
    "t5": ({"encoder": PLAIN, "decoder": ("q", "k", "v", "o", *CROSS, "up", "down")}, 2, 1),
    "t5_gated": ({"encoder": GATED, "decoder": ("q", "k", "v", "o", *CROSS, "gate", "up", "down")}, 2, 1),
}
LAYERS = {"": 2, "encoder": 2, "decoder": 2}
SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def on_meta(model_type, head=AutoModelForCausalLM, **arguments):
    with torch.device("meta"):
        return head.from_config(AutoConfig.for_model(model_type, **(SMALL | arguments)))


def of_kind(anatomy, kind):
    return [site for site in anatomy.sites if isinstance(site, kind)]


def own_parameters(model, anatomy):
    """What the untouched lines stand for: parameters of the modules they name that no site owns."""
    sites = [model.get_submodule(site.path) for site in of_kind(anatomy, LinearSite) + of_kind(anatomy, TableSite)]
    seen = {id(parameter) for module in sites for parameter in module.parameters()}
    patterns = [re.compile(re.escape(path).replace(r"\*", r"\d+")) for path, _ in anatomy.untouched]
    left = {}
    for path, module in model.named_modules():
        if any(pattern.fullmatch(path) for pattern in patterns):
            left |= {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in seen}
    return sum(left.values())


def test_the_table_of_expectations_covers_every_tiny_family():
    assert EXPECTED.keys() == tiny.FAMILIES.keys()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_site_has_the_role_and_shape_of_its_module(family):
    model = tiny.tiny(family)
    anatomy = locate(model)
    roles, copies, heads = EXPECTED[family]
    layers = {stack: LAYERS[stack] + (family == "bart" and stack == "decoder") for stack in roles}
    assert dict(anatomy.layers) == layers
    for stack, wanted in roles.items():
        for layer in range(layers[stack]):
            here = [site.role for site in of_kind(anatomy, LinearSite) if (site.stack, site.layer) == (stack, layer)]
            assert tuple(here) == wanted
    assert len({site.name for site in anatomy.sites}) == len(anatomy.sites)
    for site in of_kind(anatomy, LinearSite):
        module = model.get_submodule(site.path)
        stored = (site.inputs, site.outputs) if site.transposed else (site.outputs, site.inputs)
        assert tuple(module.weight.shape) == stored
        assert site.transposed == (family == "gpt2")
        assert site.fused == (3 if site.role == "qkv" else 1)
        assert site.dense().parameters == sum(parameter.numel() for parameter in module.parameters())
        assert site.dense().bytes == sum(parameter.nbytes for parameter in module.parameters())
    (table,) = of_kind(anatomy, TableSite)
    assert (len(table.copies), len(table.heads)) == (copies, heads)
    weight = model.get_submodule(table.path).weight
    assert weight is model.get_input_embeddings().weight
    assert tuple(weight.shape) == (table.rows, table.width)
    assert all(model.get_submodule(path).weight is weight for path in table.copies + table.heads)
    assert len(of_kind(anatomy, MemorySite)) == int(tiny.is_decoder(model))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_sites_and_untouched_add_up_to_the_whole_model(family):
    for head in ("default", "base"):
        model = tiny.tiny(family, head=head)
        anatomy = locate(model)
        touched = sum(site.dense().parameters for site in anatomy.sites)
        total = sum(parameter.numel() for parameter in model.parameters())
        assert touched + own_parameters(model, anatomy) == total


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_shapes_alone_are_enough(family):
    assert locate(tiny.tiny(family, device="meta")) == locate(tiny.tiny(family))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_names_do_not_depend_on_the_head(family):
    full, base = locate(tiny.tiny(family, device="meta")), locate(tiny.tiny(family, head="base", device="meta"))
    assert [site.name for site in full.sites] == [site.name for site in base.sites]
    assert base.in_slot("embedding")[0].heads == ()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_lookup_is_the_row_times_the_scale(family):
    model = tiny.tiny(family, dtype=torch.float64)
    site = locate(model).site("embedding")
    table, ids = model.get_submodule(site.path), torch.arange(site.rows)
    torch.testing.assert_close(table(ids), table.weight * site.scale, rtol=1e-7, atol=0)
    assert (site.scale == 1.0) == (family not in ("gemma", "gemma2", "gemma3", "bart"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_attention_sites_are_the_modules_handed_to_the_attention_function(family):
    seen = {}

    def record(module, query, key, value, attention_mask, **options):
        seen[id(module)] = (query.shape[1], key.shape[1], query.shape[-1])
        options.pop("softcap", None)  # which sdpa refuses; the values do not matter here
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("anatomy_recorder", record)
    AttentionMaskInterface.register("anatomy_recorder", sdpa_mask)
    model = tiny.tiny(family)
    model.set_attn_implementation("anatomy_recorder")
    tiny.logits(model, **tiny.inputs(model))
    sites = of_kind(locate(model), AttentionSite)
    for site in sites:
        assert seen[id(model.get_submodule(site.path))] == (site.heads, site.key_heads, site.head_width)
    crossed = {"bart": 3, "t5": 2, "t5_gated": 2}.get(family, 0)
    assert len(sites) + crossed == len(seen)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_an_attention_site_is_causal_when_the_future_does_not_matter(family):
    """Change the last token: earlier outputs of a stack stay the same exactly when its attention is causal."""
    model = tiny.tiny(family, head="base")
    batch = tiny.inputs(model)
    changed = {name: ids.clone() for name, ids in batch.items()}
    last = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    changed[last][:, -1] = (changed[last][:, -1] + 1) % 90 + 5
    moved = (tiny.logits(model, **batch) - tiny.logits(model, **changed))[:, :-1].abs().max().item()
    stack = "decoder" if model.config.is_encoder_decoder else ""
    causal = {site.causal for site in of_kind(locate(model), AttentionSite) if site.stack == stack}
    assert causal == {moved < 1e-5}
    encoder = {site.causal for site in of_kind(locate(model), AttentionSite) if site.stack == "encoder"}
    assert encoder <= {False}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_rows_and_modules_agree_about_causality(family):
    anatomy = locate(tiny.tiny(family, device="meta"))
    for stack in FAMILIES[anatomy.family].stacks:
        assert {site.causal for site in anatomy.in_slot("attention") if site.stack == stack.name} == {stack.causal}


@pytest.mark.parametrize("family", [name for name, row in tiny.FAMILIES.items() if row.decoder])
def test_the_memory_site_counts_what_the_cache_holds(family):
    model = tiny.tiny(family)
    site = locate(model).site("memory")
    asked = inspect.signature(model.get_submodule(site.path).forward).parameters
    assert {"past_key_values", "use_cache"} <= asked.keys()
    batch = tiny.inputs(model, batch=1, length=6)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
    layers = (cache.self_attention_cache if model.config.is_encoder_decoder else cache).layers
    held = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
    assert held == 6 * site.entry_bytes
    assert len(layers) == site.layers


def test_heads_tied_in_fact_but_not_by_declaration_are_found():
    model = tiny.tiny("llama_untied")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert locate(model).site("embedding").heads == ("lm_head",)


def test_heads_no_longer_tied_are_not_claimed():
    model = tiny.tiny("llama")
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    anatomy = locate(model)
    assert anatomy.site("embedding").heads == ()
    assert "untied head" in dict(anatomy.untouched)["lm_head"]


def test_what_is_left_alone_is_named_with_a_reason():
    untouched = dict(locate(tiny.tiny("bert", device="meta")).untouched)
    assert "position table" in untouched["bert.embeddings.position_embeddings"]
    assert "token-type" in untouched["bert.embeddings.token_type_embeddings"]
    assert "task head" in untouched["cls.predictions.transform.dense"]
    assert "normalisation" in untouched["bert.encoder.layer.*.output.LayerNorm"]
    untouched = dict(locate(tiny.tiny("t5", device="meta")).untouched)
    assert "cross-attention" in untouched["decoder.block.*.layer.1.EncDecAttention"]
    assert any("relative position bias" in reason for reason in untouched.values())


def test_windows_and_caps_of_the_model_itself_are_told():
    anatomy = locate(tiny.tiny("gemma2", device="meta"))
    assert [(site.window, site.softcap) for site in anatomy.in_slot("attention")] == [(8, 50.0), (None, 50.0)]
    assert anatomy.site("attention.0").position == "rope"
    assert {site.window for site in locate(tiny.tiny("llama", device="meta")).in_slot("attention")} == {None}


@pytest.mark.parametrize(
    ("family", "head", "stacks", "changes"),
    [
        ("bart", "BartForCausalLM", ["decoder"], {}),
        ("bart", "BartForSequenceClassification", ["encoder", "decoder"], {}),
        ("t5", "T5EncoderModel", ["encoder"], {}),
        ("t5", "T5ForTokenClassification", ["encoder"], {}),
        ("llama", "LlamaForSequenceClassification", [""], {}),
        ("llama", "LlamaForQuestionAnswering", [""], {}),
        ("bert", "BertForSequenceClassification", [""], {}),
        ("bert", "BertLMHeadModel", [""], {"is_decoder": True, "add_cross_attention": True}),
    ],
)
def test_other_heads_and_halves(family, head, stacks, changes):
    model = tiny.tiny(family, head=head, **changes)
    anatomy = locate(model)
    assert list(anatomy.layers) == stacks
    touched = sum(site.dense().parameters for site in anatomy.sites)
    assert touched + own_parameters(model, anatomy) == sum(parameter.numel() for parameter in model.parameters())
    if head == "BertLMHeadModel":
        assert {site.causal for site in anatomy.in_slot("attention")} == {True}
        assert anatomy.site("memory").path == "bert"
        assert anatomy.site("projection.1.cross_k").path.endswith("1.crossattention.self.key")


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"bart", "t5"}))
def test_every_row_fits_a_model_of_its_type(model_type):
    small = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4} if "t5" in model_type else {}
    anatomy = locate(on_meta(model_type, head=AutoModel, **small))
    assert anatomy.family == model_type
    assert anatomy.in_slot("feedforward")


def test_length_is_the_models_own_up_to_2048():
    assert locate(tiny.tiny("bert", device="meta")).site("attention.0").length == 128
    assert locate(tiny.tiny("roberta", device="meta")).site("attention.0").length == 126
    assert locate(tiny.tiny("t5", device="meta")).site("memory").length == 512
    long = tiny.tiny("llama", device="meta", max_position_embeddings=1 << 17)
    assert locate(long).site("memory").length == 2048
    assert locate(long, length=16384).site("attention.1").length == 16384


@pytest.mark.parametrize(("family", "length", "message"), [("bert", 129, "128 learned"), ("llama", 0, "at least 1")])
def test_impossible_lengths_are_refused(family, length, message):
    with pytest.raises(TautError, match=message):
        locate(tiny.tiny(family, device="meta"), length=length)


def test_an_unknown_site_name_gets_the_nearest():
    with pytest.raises(TautError, match=r"did you mean 'feedforward.0.up'"):
        locate(tiny.tiny("bert", device="meta")).site("feedforward.0.upp")


def test_half_a_model_is_refused():
    with pytest.raises(TautError, match=r"no layers at 'encoder.layers' or 'decoder.layers'"):
        locate(tiny.tiny("bart", device="meta").model.encoder)


def test_another_quantization_is_refused():
    model = tiny.tiny("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TautError, match=r"layers\.0\.mlp\.up_proj: weights of dtype float8_e4m3fn"):
        locate(model)


PROBED = {
    "olmo": ({}, GATED, "rope"),
    "phi": ({}, PLAIN, "rope"),
    "stablelm": ({}, GATED, "rope"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, PLAIN, "learned"),
    "phi3": ({"num_key_value_heads": 2}, ("qkv", "o", "gate_up", "down"), "rope"),
    "bloom": ({"n_layer": 2, "n_head": 4}, FUSED, None),
}


@pytest.mark.parametrize("model_type", PROBED)
def test_an_unknown_family_is_probed(model_type):
    changes, roles, position = PROBED[model_type]
    model = on_meta(model_type, **changes)
    anatomy = locate(model)
    assert anatomy.family == f"probed:{model_type}"
    assert tuple(site.role for site in of_kind(anatomy, LinearSite) if site.layer == 1) == roles
    assert {site.position for site in of_kind(anatomy, AttentionSite | MemorySite)} == ({position} - {None})
    touched = sum(site.dense().parameters for site in anatomy.sites)
    assert touched + own_parameters(model, anatomy) == sum(parameter.numel() for parameter in model.parameters())
    if model_type == "phi3":
        assert (anatomy.site("attention.0").key_heads, anatomy.site("projection.0.qkv").fused) == (2, 1)
    if model_type == "bloom":
        assert any("attention function of its own" in reason for _, reason in anatomy.untouched)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_probe_finds_what_the_table_says(family, monkeypatch):
    """On known families, the probe and the hand-written row must agree about everything but the name."""
    model = tiny.tiny(family, device="meta")
    expected = locate(model)
    monkeypatch.setattr("taut.architectures.locate.FAMILIES", {})
    probed = locate(model)
    assert probed.family.startswith("probed:")
    assert [site.path for site in probed.sites] == [site.path for site in expected.sites]
    assert [site.name for site in probed.sites] == [site.name for site in expected.sites]
    if family != "roberta":  # its two reserved positions are not visible in the modules
        assert probed.sites == expected.sites


@pytest.mark.parametrize(
    ("model_type", "head", "changes", "missing"),
    [
        ("mamba", AutoModelForCausalLM, {}, "no list of layers with query, key and value maps"),
        ("resnet", AutoModel, None, "no token table"),
        ("vit", AutoModel, {}, "no token table"),
        ("albert", AutoModel, {"embedding_size": 32}, "no list of 2 layers with attention"),
        ("mixtral", AutoModelForCausalLM, {"num_local_experts": 2}, "no pair of feed-forward maps"),
    ],
)
def test_a_hopeless_family_is_refused_with_what_is_missing(model_type, head, changes, missing):
    config = AutoConfig.for_model(model_type, **({} if changes is None else SMALL | changes))
    with torch.device("meta"):
        model = head.from_config(config)
    with pytest.raises(TautError, match=f"{model_type}.*{missing}"):
        locate(model)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_skeleton_is_what_loading_gives(family, dtype, tmp_path):
    model = tiny.tiny(family, dtype=dtype)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    bare = skeleton(AutoConfig.from_pretrained(tmp_path))
    assert type(bare) is type(loaded)
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert locate(bare) == locate(loaded)


def test_a_skeleton_without_architectures_is_the_base_model():
    config = transformers.LlamaConfig(**SMALL)
    bare = skeleton(config, dtype=torch.bfloat16)
    assert type(bare).__name__ == "LlamaModel"
    assert {parameter.dtype for parameter in bare.parameters()} == {torch.bfloat16}
    assert config.dtype is None


def test_a_type_without_a_model_is_refused():
    with pytest.raises(TautError, match="pix2struct"):
        skeleton(AutoConfig.for_model("pix2struct"))
