"""memory.key_norm and memory.attention_score: bounded, every head for itself, whatever way the tokens come in."""

import pytest
import torch
from decoding import CHUNKS, DECODERS, LENGTH, install, own
from slow_memory import Evicting, slowly
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from taut.architectures.locate import locate
from taut.contract.tiny import inputs, logits, padded_inputs, stepwise, tiny
from taut.core.errors import TautError
from taut.core.site import AttentionSite, MemorySite
from taut.methods.attention.local_global import LocalGlobal
from taut.methods.memory._eviction import EvictionMethod
from taut.methods.memory.attention_score import AttentionScore
from taut.methods.memory.key_norm import KeyNorm
from taut.ops.caches import eviction
from taut.ops.caches.eviction import Cut
from taut.surgery.attention import install_attention

ENTRIES = 6
STORE = {"method": "low_bit", "bits": 4, "group": 4}
METHODS: dict[str, EvictionMethod] = {
    "norm": KeyNorm.parse({"entries": ENTRIES, "recent": 2}),
    "norm in 4 bits": KeyNorm.parse({"entries": ENTRIES, "recent": 0, "store": STORE}),
    "accumulated": AttentionScore.parse({"entries": ENTRIES}),
    "accumulated in 8 bits": AttentionScore.parse({"entries": ENTRIES, "store": {"method": "low_bit"}}),
    "last": AttentionScore.parse({"entries": ENTRIES, "score": "last"}),
    "last and recent": AttentionScore.parse({"entries": ENTRIES, "score": "last", "recent": 3}),
}


def memory_site(family: str) -> MemorySite:
    return next(site for site in locate(tiny(family), LENGTH).sites if isinstance(site, MemorySite))


FITTING = [family for family in DECODERS if METHODS["norm"].fits(memory_site(family)) is None]
EACH_METHOD = pytest.mark.parametrize("name", METHODS)
EACH_CHUNKING = pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)


def started(family: str, name: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    model = tiny(family, dtype=dtype)
    install(model, METHODS[name])
    return model


def test_families() -> None:
    assert set(DECODERS) - set(FITTING) == {"gemma3", "t5", "t5_gated"}
    assert "window of 8" in METHODS["norm"].fits(memory_site("gemma3"))
    assert "biases scores by distance" in METHODS["norm"].fits(memory_site("t5"))


@pytest.mark.parametrize("family", FITTING)
@EACH_CHUNKING
@EACH_METHOD
def test_equals_one_pass_under_the_mask_it_chose(family: str, chunks: list[int], name: str) -> None:
    model, method = tiny(family, dtype=torch.float64), METHODS[name]
    batch = inputs(model, length=LENGTH)
    rule = Evicting(name.split()[0], ENTRIES, method.recent, chunks)
    with slowly(model, rule, method.store):
        expected = logits(model, **batch, use_cache=False)
    install(model, method)
    assert not torch.allclose(logits(model, **batch, use_cache=False), expected, atol=1e-3)
    steps, past = stepwise(model, chunks, **batch)
    assert (steps - expected).abs().max() <= 1e-12
    assert len(rule.dropped) > 1, "heads must differ in what they drop, or the test shows little"
    for layer in own(past).layers:
        assert layer.keys.shape[2] == layer.values.shape[2] == layer.scores.shape[2] == ENTRIES
    assert past.get_seq_length() == LENGTH


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("surplus", [1, 4])
def test_a_cut_is_what_sorting_gives(ragged: bool, surplus: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(3, (2, 3, 10), generator=generator).float()
        real = torch.ones(2, 10, dtype=torch.bool)
        if ragged:
            real[1, torch.randperm(10, generator=generator)[: surplus + 2]] = False
        age = real.flip(1).cumsum(1).flip(1)
        safe, count = real & (age <= 2), 10 - surplus
        index = Cut(count, safe, real if ragged else None).index(scores)
        for row in range(2):
            for head in range(3):
                places = [place for place in range(10) if real[row, place]]
                order = sorted(places, key=lambda place: (bool(safe[row, place]), scores[row, head, place], place))
                kept = sorted(order[-count:])
                empty = count - len(kept)
                assert index[row, head, empty:].tolist() == kept
                assert not real[row, index[row, head, :empty]].any()


@EACH_METHOD
def test_holes_in_the_mask_are_as_if_cut_out(name: str) -> None:
    model = started("llama", name)
    batch = inputs(model, batch=1, length=LENGTH)
    batch["attention_mask"][0, [8, 9, 13, 20, 23]] = 0
    real = batch["attention_mask"].bool()[0]
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    chunks = CHUNKS["in pieces"]
    own_chunks = [count for piece in real.split(chunks) if (count := int(piece.sum()))]
    alone, _ = stepwise(model, own_chunks, input_ids=batch["input_ids"][:, real])
    together, _ = stepwise(model, chunks, **batch)
    assert (together[:, real] - alone).abs().max() <= 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
@EACH_METHOD
def test_beams_score_as_their_sequences_do(family: str, name: str) -> None:
    model = started(family, name)
    batch = {key: tensor for key, tensor in padded_inputs(model).items() if key != "decoder_input_ids"}
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "length_penalty": 0.0}
    scored = {"num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(**batch, **options, **scored)
    assert all(layer.keys.shape[2] == ENTRIES for layer in own(output.past_key_values).layers)
    sequence, key = output.sequences, "decoder_input_ids" if family == "bart" else "input_ids"
    chunks = [sequence.shape[1] - 10] + [1] * 9
    again = {key: sequence[:, :-1]}
    if family == "bart":
        again |= batch
    else:
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
        again |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    steps, _ = stepwise(model, chunks, **again)
    expected = steps[:, -10:].log_softmax(-1).gather(2, sequence[:, -10:, None]).sum((1, 2))
    assert torch.allclose(expected, output.sequences_scores.double(), atol=1e-5)


@EACH_METHOD
def test_rows_can_be_repeated_chosen_and_moved(name: str) -> None:
    model = started("llama", name)
    batch = inputs(model, batch=3, length=LENGTH)
    batch["attention_mask"][1, :4] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    whole, _ = stepwise(model, [10, 14], **batch)
    moves = {
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        "reorder_cache": (torch.tensor([1, 1, 0]), [1, 1, 0]),
    }
    for move, (argument, rows) in moves.items():
        first = {key: tensor[:, :10] for key, tensor in batch.items()}
        _, past = stepwise(model, [10], **first)
        vars(type(past))[move](past, argument)
        rest = {key: tensor[rows, 10:] for key, tensor in batch.items() if key != "attention_mask"}
        with torch.no_grad():
            again = model(**rest, attention_mask=batch["attention_mask"][rows], past_key_values=past)["logits"]
        assert (again - whole[rows, 10:]).abs().max() <= 1e-12


@pytest.mark.parametrize("padded", [False, True])
@EACH_METHOD
def test_crop_equals_never_having_seen(name: str, padded: bool) -> None:
    model = started("llama", name)
    batch = inputs(model, length=LENGTH)
    if padded:
        batch["attention_mask"][1, :5] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected, _ = stepwise(model, [14, 3, 7], **batch)
    cache = METHODS[name].cache(2)
    cache.activate_past_recording()

    def read(start: int, stop: int, ids: Tensor) -> Tensor:
        step = {"attention_mask": batch["attention_mask"][:, :stop], "position_ids": batch["position_ids"]}
        step["position_ids"] = step["position_ids"][:, start:stop]
        with torch.no_grad():
            return model(input_ids=ids[:, start:stop], **step, past_key_values=cache)["logits"]

    ids = batch["input_ids"]
    wrong = torch.where(torch.arange(LENGTH) < 14, ids, (ids + 1) % 90)
    first = torch.cat([read(0, 10, ids), read(10, 18, wrong)[:, :4]], 1)
    cache.crop(-4)
    assert cache.get_seq_length() == 14
    assert cache.layers[0].keys.shape[2] == ENTRIES
    second = read(14, 17, ids)
    cache.crop(0)
    third = read(17, 24, ids)
    real = batch["attention_mask"].bool()
    assert (torch.cat([first, second, third], 1) - expected)[real].abs().max() <= 1e-12


def test_crop_before_anything_was_dropped() -> None:
    model = started("llama", "norm")
    ids = inputs(model, length=12)["input_ids"]
    expected, _ = stepwise(model, [3, 1, 8], input_ids=ids)
    _, cache = stepwise(model, [ENTRIES], input_ids=ids[:, :ENTRIES])
    cache.crop(-3)
    rest, _ = stepwise(model, [1, 8], cache, input_ids=ids[:, 3:])
    assert (rest - expected[:, 3:]).abs().max() <= 1e-12
    with pytest.raises(TautError, match="cannot take 1 tokens back, 0 are unconfirmed"):
        cache.crop(-1)


@EACH_METHOD
def test_assisted_decoding(name: str) -> None:
    model = started("llama", name, torch.float32)
    batch = inputs(model, batch=1)
    options = {"max_new_tokens": 14, "min_new_tokens": 14, "do_sample": False, "prompt_lookup_num_tokens": 3}
    cache = METHODS[name].cache(2)
    answer = model.generate(**batch, **options, past_key_values=cache)
    assert answer.shape[1] == 26
    assert cache.layers[0].keys.shape[2] == ENTRIES
    with pytest.raises(TautError, match="pass an empty cache of this recipe"):
        model.generate(**batch, **options)
    roomy = type(METHODS[name])(METHODS[name].knobs.model_copy(update={"entries": 40, "store": None}))
    model = tiny("llama")
    original = model.generate(**batch, **options)
    install(model, roomy)
    assert torch.equal(model.generate(**batch, **options, past_key_values=roomy.cache(2)), original)


@EACH_METHOD
def test_room_for_all_is_the_original_and_one_pass_drops_nothing(name: str) -> None:
    model = tiny("llama", dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    before = logits(model, **batch)
    plain = {"store": None}
    undo = install(model, type(METHODS[name])(METHODS[name].knobs.model_copy(update=plain)))
    assert (logits(model, **batch, use_cache=False) - before).abs().max() <= 1e-12
    undo()
    install(model, type(METHODS[name])(METHODS[name].knobs.model_copy(update=plain | {"entries": LENGTH})))
    for chunks in CHUNKS.values():
        assert (stepwise(model, chunks, **batch)[0] - before).abs().max() <= 1e-12


@pytest.mark.parametrize("name", ["accumulated", "last"])
def test_weights_some_at_a_time_are_the_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = started("llama", name)
    batch = inputs(model, length=LENGTH)
    batch["attention_mask"][1, :7] = 0
    expected, past = stepwise(model, [20, 4], **batch)
    monkeypatch.setattr(eviction, "WEIGHTS_AT_ONCE", 500)
    again, other = stepwise(model, [20, 4], **batch)
    assert (again - expected).abs().max() <= 1e-12
    assert torch.allclose(past.layers[0].scores, other.layers[0].scores, rtol=1e-5)


def test_float32_and_inference_mode() -> None:
    for name in ("norm", "accumulated", "last"):
        batch = inputs(tiny("llama"), length=LENGTH)
        double, _ = stepwise(started("llama", name), CHUNKS["in pieces"], **batch)
        model = started("llama", name, torch.float32)
        single, _ = stepwise(model, CHUNKS["in pieces"], **batch)
        assert (single - double).abs().max() <= 1e-4
        with torch.inference_mode():
            past = model(input_ids=batch["input_ids"][:, :12], use_cache=True)["past_key_values"]
        stepwise(model, [1, 11], past, input_ids=batch["input_ids"][:, 12:])


def test_what_cannot_be_served_is_told() -> None:
    model = tiny("llama")
    batch = inputs(model)
    filled = model(**batch, past_key_values=DynamicCache())["past_key_values"]
    undo = install(model, METHODS["norm"])
    with pytest.raises(TautError, match="already holds 12 tokens"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=filled)
    with pytest.raises(TautError, match="StaticCache"):
        model.generate(**batch, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(TautError, match="serves only the model"):
        tiny("llama")(**batch, past_key_values=METHODS["norm"].cache(2))
    undo()
    sites = [site for site in locate(model).sites if isinstance(site, AttentionSite)]
    install_attention(model, {site.path: (LocalGlobal.parse({"window": 4}), site) for site in sites})
    install(model, METHODS["norm"])
    past = model(**batch, use_cache=True)["past_key_values"]
    with pytest.raises(TautError, match=r"no attention\.local_global"):
        model(input_ids=batch["input_ids"][:, :1], past_key_values=past)
    with pytest.raises(TautError, match="recent = 7 is more than the 6 entries"):
        KeyNorm.parse({"entries": 6, "recent": 7})


def test_keep_counts_entries() -> None:
    site = memory_site("llama")
    assert KeyNorm.parse({}, 0.5).solve(site, 0.5).entries(site) == LENGTH // 2
    assert AttentionScore.parse({}, 0.5).solve(site, 0.5).recent == LENGTH // 4
    assert KeyNorm.parse({}).entries(site) == LENGTH
    with pytest.raises(TautError, match="keep = 0.25 of 24 entries is 6: 8 must stay; the least keep is 0.3333"):
        KeyNorm.parse({"recent": 8}, 0.25).solve(site, 0.25)
