"""memory.anchor: segments that end with an anchor, whatever way the tokens come in."""

import copy
import warnings

import pytest
import torch
from decoding import CHUNKS, DECODERS, LENGTH, install
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor

from taut.contract.tiny import inputs, logits, stepwise, tiny
from taut.core.errors import TautError
from taut.core.site import MemorySite
from taut.methods.memory.anchor import cache as anchor_cache
from taut.methods.memory.anchor.cache import Anchoring, Segments
from taut.methods.memory.anchor.method import Anchor
from taut.ops.attention.masks import Causal
from taut.ops.caches.base import Incoming

ANCHORS = tuple(range(3, 20))
"""Of 97 tokens: about every sixth."""
METHODS = {
    "ids": Anchor.parse({"ids": ANCHORS, "longest": 0}),
    "every": Anchor.parse({"every": 4}),
    "bounded": Anchor.parse({"ids": ANCHORS, "longest": 3}),
    "source": Anchor.parse({"ids": ANCHORS, "source_ids": tuple(range(20, 40))}),
}
BY_IDS = METHODS["ids"]


def incoming(ids: Tensor, restarts: Tensor | None = None) -> Incoming:
    return Incoming(ids.shape[1], ids.device, ids, restarts=restarts)


def mask_of(method: Anchor, ids: Tensor) -> Tensor:
    """(B, T, T) who sees whom in a text read at once."""
    marks = method.marks(incoming(ids))
    places = torch.arange(ids.shape[1])
    return Segments().between(marks, marks) & Causal().allowed(places, places)


def slow_mask(ids: list[int], anchors: tuple[int, ...], longest: int, source_ends: tuple[int, ...]) -> list[list[bool]]:
    """Token by token, as the paper says it."""
    segments, kinds, number, length, source = [], [], 0, 0, bool(source_ends)
    for token in ids:
        segments.append(number)
        if source:
            kinds.append("whole")
            if token in source_ends:
                source, number = False, number + 1
            continue
        length += 1
        kinds.append("anchor" if token in anchors or (longest and length == longest) else "")
        if kinds[-1]:
            number, length = number + 1, 0
    rows = range(len(ids))
    return [
        [j <= i and (segments[i] == segments[j] or bool(kinds[j] and kinds[i] != "anchor")) for j in rows] for i in rows
    ]


def test_the_mask_of_the_paper() -> None:
    ids = torch.tensor([[50, 51, 52, 3, 53, 54, 4, 55]])
    rows = ["10000000", "11000000", "11100000", "11110000", "00011000", "00011100", "00001110", "00010011"]
    assert mask_of(BY_IDS, ids)[0].tolist() == [[seen == "1" for seen in row] for row in rows]
    nowhere = torch.full((1, 6), 60)
    assert torch.equal(mask_of(BY_IDS, nowhere)[0], torch.ones(6, 6, dtype=torch.bool).tril())
    assert torch.equal(mask_of(BY_IDS, torch.full((1, 6), 3))[0], torch.eye(6, dtype=torch.bool))


@pytest.mark.parametrize("name", METHODS)
def test_marks_are_the_slow_rule_wherever_the_text_is_cut(name: str) -> None:
    anchoring = METHODS[name].anchoring
    for seed in range(20):
        ids = torch.randint(97, (3, 30), generator=torch.Generator().manual_seed(seed))
        seen = mask_of(METHODS[name], ids)
        rule = anchoring.ids, anchoring.longest, anchoring.source_ends
        assert seen.tolist() == [slow_mask(row, *rule) for row in ids.tolist()]
        before, pieces = anchoring.start(incoming(ids)), []
        for piece in ids.split([1, 4, 7, 2, 16], 1):
            marks, before = anchoring.marks(incoming(piece), before)
            pieces.append(marks)
        assert torch.equal(torch.cat(pieces, 1), METHODS[name].marks(incoming(ids)))


@pytest.mark.parametrize("name", METHODS)
def test_packed_sequences_are_marked_as_if_alone(name: str) -> None:
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    restarts = torch.zeros(1, 30, dtype=torch.bool)
    restarts[0, [11, 17]] = True
    marks = METHODS[name].marks(incoming(ids, restarts))
    sees = Segments().between(marks, marks)
    for start, stop in ((0, 11), (11, 17), (17, 30)):
        alone = METHODS[name].marks(incoming(ids[:, start:stop]))
        assert torch.equal(sees[:, start:stop, start:stop], Segments().between(alone, alone))
    model = tiny("llama", dtype=torch.float64)
    install(model, METHODS[name])
    places = torch.cat([torch.arange(11), torch.arange(6), torch.arange(13)])[None]
    packed = logits(model, input_ids=ids[:1], position_ids=places, use_cache=False)
    apart = [logits(model, input_ids=part) for part in ids[:1].split([11, 6, 13], 1)]
    assert (packed - torch.cat(apart, 1)).abs().max() <= 1e-12


@pytest.mark.parametrize(
    "family", [family for family in DECODERS if family not in ("gemma3", "bart", "t5", "t5_gated")]
)
@pytest.mark.parametrize("name", METHODS)
def test_one_pass_is_the_mask(family: str, name: str) -> None:
    model = tiny(family, dtype=torch.float64)
    ids = inputs(model, length=LENGTH)["input_ids"]
    mask = mask_of(METHODS[name], ids)[:, None]
    masked = logits(model, input_ids=ids, attention_mask=mask, use_cache=False)
    assert (logits(model, input_ids=ids, use_cache=False) - masked).abs().max() > 1e-3
    install(model, METHODS[name])
    assert (logits(model, input_ids=ids, use_cache=False) - masked).abs().max() <= 1e-12


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_what_one_more_token_would_see_is_held(name: str, chunks: list[int]) -> None:
    model = tiny("llama", dtype=torch.float64)
    ids = inputs(model, length=LENGTH)["input_ids"]
    install(model, METHODS[name])
    steps, past = stepwise(model, chunks, input_ids=ids)
    assert (steps - logits(model, input_ids=ids, use_cache=False)).abs().max() <= 1e-12
    needed = mask_needed_later(METHODS[name], ids)
    assert all(layer.keys.shape[2] == layer.values.shape[2] == needed for layer in past.layers)


def mask_needed_later(method: Anchor, ids: Tensor) -> int:
    """The most entries that one more ordinary token would see in any row."""
    longer = torch.cat([ids, torch.full((len(ids), 1), 90)], 1)
    if method.knobs.every:
        longer = longer[:, : ids.shape[1] + 1]
    return int(mask_of(method, longer)[:, -1].sum(1).max()) - 1


def test_places_in_the_cache_are_not_positions() -> None:
    """The published code renumbers what remains: that is another function."""
    model = tiny("llama", dtype=torch.float64)
    install(model, BY_IDS)
    ids = torch.tensor([[50, 51, 52, 3, 53, 54, 4, 55, 56, 57]])
    whole = logits(model, input_ids=ids, use_cache=False)
    _, past = stepwise(model, [7], input_ids=ids[:, :7])
    assert past.layers[0].keys.shape[2] == 2
    collapsed = torch.arange(2, 5)[None]
    true, _ = stepwise(model, [1] * 3, copy.deepcopy(past), input_ids=ids[:, 7:])
    wrong, _ = stepwise(model, [1] * 3, copy.deepcopy(past), input_ids=ids[:, 7:], position_ids=collapsed)
    assert (true - whole[:, 7:]).abs().max() <= 1e-12
    assert (wrong - whole[:, 7:]).abs().max() > 1e-3


def test_what_passes_from_segment_to_segment_passes_through_anchors() -> None:
    """By way of its anchor, an ordinary token reaches those of later segments in two layers. Their anchor, which sees
    its own segment alone, would have it in three."""
    ids = torch.tensor([[50, 51, 52, 3, 53, 54, 4, 55, 56]])
    other = ids.clone()
    other[0, 1] = 60
    for layers, reaches in ((1, False), (2, True)):
        model = tiny("llama", dtype=torch.float64)
        model.model.layers = model.model.layers[:layers]
        install(model, BY_IDS)
        one, two = (logits(model, input_ids=tokens, use_cache=False)[0] for tokens in (ids, other))
        later = [4, 5, 7, 8]
        assert torch.equal(one[later], two[later]) != reaches
        assert torch.equal(one[6], two[6])


def test_crop_over_an_anchor_equals_never_having_seen_it() -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, BY_IDS)
    ids = torch.tensor([[50, 51, 52, 3, 53, 54, 55, 56, 57]])
    wrong = torch.tensor([[50, 51, 52, 3, 53, 4, 60]])
    whole = logits(model, input_ids=ids, use_cache=False)
    for cut in ([7], [2, 5], [1] * 7):
        cache = BY_IDS.cache(2)
        cache.activate_past_recording()
        _, cache = stepwise(model, cut, cache, input_ids=wrong)
        cache.crop(-2)
        assert (cache.get_seq_length(), cache.layers[0].keys.shape[2]) == (5, 2)
        rest, _ = stepwise(model, [1, 3], cache, input_ids=ids[:, 5:])
        assert (rest - whole[:, 5:]).abs().max() <= 1e-12


def test_two_questions_of_one_prefix_do_not_meet() -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, BY_IDS)
    prefix = torch.tensor([[50, 51, 52, 3, 53, 54, 4]])
    questions = torch.tensor([[60, 61, 5, 62], [70, 6, 71, 72]])
    _, kept = stepwise(model, [7], input_ids=prefix)
    assert [layer.keys.shape[2] for layer in kept.layers] == [2, 2]
    before = [layer.keys.clone() for layer in kept.layers]
    for question in questions:
        whole = logits(model, input_ids=torch.cat([prefix, question[None]], 1), use_cache=False)
        answer, _ = stepwise(model, [2, 1, 1], copy.deepcopy(kept), input_ids=question[None])
        assert (answer - whole[:, 7:]).abs().max() <= 1e-12
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, kept.layers, strict=True))


def test_five_demonstrations_of_a_hundred_tokens_leave_five_entries() -> None:
    model = tiny("llama", max_position_embeddings=600)
    install(model, BY_IDS)
    demonstrations = torch.randint(40, 90, (1, 500), generator=torch.Generator().manual_seed(0))
    demonstrations[0, 99::100] = 3
    _, past = stepwise(model, [500], input_ids=demonstrations)
    assert [layer.keys.shape[2] for layer in past.layers] == [5, 5]
    full = 500 * past.layers[0].keys[0, :, :1].nbytes
    assert 1 - past.layers[0].keys.untyped_storage().nbytes() / full == 0.99


def test_cost() -> None:
    site = MemorySite(
        slot="memory", path="model", layers=2, key_heads=2, head_width=8, position="rope", length=500, dtype="float32"
    )
    assert Anchor.parse({"every": 100}).entries(site) == 5 + 100
    assert BY_IDS.entries(site) == 500 // 25 + 25
    assert Anchor.parse({"ids": [3], "segment": 400}).entries(site) == 401


def test_strings_are_looked_up() -> None:
    tokenizer = tiny_tokenizer()
    method = Anchor.parse({})
    assert method.knobs == Anchor.parse({"anchors": "punctuation"}).knobs
    with pytest.raises(TautError, match="need a tokenizer"):
        method.cache(2)
    anchor = method.with_tokenizer(lambda: tokenizer)
    assert {tokenizer.decode([index]).strip() for index in anchor.knobs.ids} == {".", "!", "?"}
    assert anchor.with_tokenizer(lambda: tokenizer).knobs == anchor.knobs
    with pytest.raises(TautError, match="'zyzzyva' is not one token of this tokenizer but '"):
        Anchor.parse({"anchors": "zyzzyva"}).with_tokenizer(lambda: tokenizer)


def test_wrong_input_is_told() -> None:
    for knobs, message in (
        ({"every": 3, "ids": [4]}, "give every or ids, not both"),
        ({"every": 0}, "every = 0"),
        ({"ankers": "."}, "did you mean 'anchors'"),
    ):
        with pytest.raises(TautError, match=message):
            Anchor.parse(knobs)
    model = tiny("llama")
    install(model, BY_IDS)
    with pytest.raises(TautError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.zeros(1, 4, model.config.hidden_size))
    with pytest.raises(TautError, match="serves only the model"):
        tiny("llama")(**inputs(model), past_key_values=BY_IDS.cache(2))


def test_a_segment_that_never_ends_is_cut_and_told_once() -> None:
    anchor_cache._warn_of_long_segments.cache_clear()
    ids = torch.full((1, 12), 60)
    with pytest.warns(UserWarning, match="no anchor for 5 tokens"):
        marks = Anchoring(ids=(7,), longest=5).marks(incoming(ids), Anchoring().start(incoming(ids)))[0]
    assert (marks % 4).tolist() == [[0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        METHODS["every"].marks(incoming(ids))
        Anchoring(ids=(7,), longest=5).marks(incoming(ids), Anchoring().start(incoming(ids)))
