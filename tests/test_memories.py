"""What every memory owes, found by discovery: each line of each row of the contract, whatever way the tokens come in.

In float64, where roundings differ by too little to reach another code of a store: so it holds to 1e-12 with stores too.
What is particular to a method stands in a file of its own.
"""

import copy
from collections.abc import Iterable
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch
from decoding import CHUNKS, DECODERS, LENGTH, own
from torch import Tensor
from transformers import Cache, PreTrainedModel

from taut.contract.case import Case, cases, rows
from taut.contract.conditions import steps_agree
from taut.contract.tiny import inputs, logits, padded_inputs, stepwise
from taut.core.errors import TautError
from taut.core.registry import METHODS
from taut.methods.base import LEARNED, MemoryMethod
from taut.ops.caches.base import PositionedCache
from taut.surgery.apply import apply, undo
from taut.surgery.plan import Step

ROWS = rows()
MEMORIES = [name for name in METHODS.built_in() if name.startswith("memory.") and name != "memory.identity"]
VARYING = ("memory.anchor", "memory.compressive")
"""What these hold rises and falls, and their predictions speak of the most."""
TURNS = (("one by one",), ("long prompt", "in pieces"), ("growing",))
TOLERANCE = 1e-12


def turn(case: Case) -> int:
    """Where it would take too long for every line to do everything, the lines of a method take turns."""
    return ROWS[case.method].index(dict(case.entry)) + DECODERS.index(case.family)


def listed(chosen: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=case.label) for case in chosen])


def each(*families: str) -> pytest.MarkDecorator:
    """Every line on every family."""
    return listed(case for method in MEMORIES for case in cases(method, families))


def in_turn(*families: str) -> pytest.MarkDecorator:
    """Every line on one of the families."""
    lines = [(method, index, line) for method in MEMORIES for index, line in enumerate(ROWS[method])]
    return listed(Case(method, families[index % len(families)], tuple(line.items())) for method, index, line in lines)


def started(case: Case, equal: bool = False) -> tuple[PreTrainedModel, Step]:
    """The model with the memory in it, as if what it learns with had learned something. Skips where the method says
    why it cannot: with ``equal`` also where steps need not equal one pass."""
    obstacle = case.misfit or (steps_agree(case) if equal else None)
    if obstacle:
        pytest.skip(obstacle)
    model = case.model(torch.float64)
    plan = case.planned(model, LENGTH)
    apply(model, plan)
    (step,) = plan.steps
    learned = dict(model.get_submodule(step.site.path).named_children()).get(LEARNED, torch.nn.Module())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in learned.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model, step


def check_held(past: Cache, step: Step) -> None:
    """Every layer holds as many entries as are predicted for what was read."""
    predicted = step.method.entries(replace(step.site, length=past.get_seq_length()))
    counts = {tensor.shape[2] for layer in own(past).layers for tensor in (layer.keys, layer.values)}
    assert len(counts) == 1
    assert max(counts) <= predicted
    assert step.method.id in VARYING or counts == {predicted}


def alone(model: PreTrainedModel, method: MemoryMethod, ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits of the last tokens of a text that came in these pieces: of one pass, where that is to be the same."""
    if method.unequal is None:
        return logits(model, input_ids=ids, use_cache=False)
    stops = [max(0, stop - sum(chunks) + ids.shape[1]) for stop in accumulate(chunks, initial=0)]
    return stepwise(model, [stop - start for start, stop in pairwise(stops) if stop > start], input_ids=ids)[0]


@each(*DECODERS)
def test_steps_equal_one_pass(case: Case) -> None:
    model, step = started(case, equal=True)
    batch = inputs(model, length=LENGTH)
    whole = logits(model, **batch, use_cache=False)
    for name in CHUNKS if case.family == "llama" else TURNS[turn(case) % 3]:
        steps, past = stepwise(model, CHUNKS[name], **batch)
        assert (steps - whole).abs().max() <= TOLERANCE
        assert past.get_seq_length() == LENGTH
        check_held(past, step)
    undo(model)
    assert (logits(model, **batch, use_cache=False) - whole).abs().max() > 1e-3


@each("gpt2", "llama")
def test_left_padded_rows_equal_the_rows_alone(case: Case) -> None:
    """What stands in the padding is arbitrary; one of the batches has no row without any."""
    model, step = started(case)
    pads, names = ((0, 1, 17), CHUNKS) if case.family == "llama" else ((2, 6), TURNS[turn(case) % 3])
    batch = inputs(model, batch=len(pads), length=LENGTH)
    for row, count in enumerate(pads):
        batch["attention_mask"][row, :count] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for chunks in ([LENGTH], *(CHUNKS[name] for name in names)):
        together, past = stepwise(model, chunks, **batch)
        for row, count in enumerate(pads):
            expected = alone(model, step.method, batch["input_ids"][row : row + 1, count:], chunks)
            assert (together[row, count:] - expected[0]).abs().max() <= TOLERANCE
        check_held(past, step)


@each("gpt2", "llama", "bart", "t5")
def test_generate_obeys(case: Case) -> None:
    model, step = started(case, equal=True)
    batch = {name: tensor for name, tensor in padded_inputs(model).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "num_beams": (1, 3)[turn(case) % 2]}
    ours = model.generate(**batch, **options, return_dict_in_generate=True)
    assert type(own(ours.past_key_values)) is type(step.method.cache(step.site.layers))
    assert torch.equal(ours.sequences, model.generate(**batch, **options, use_cache=False))
    check_held(ours.past_key_values, step)


@listed(cases(method, (family,))[0] for method in MEMORIES for family in ("llama", "bart"))
def test_generate_obeys_no_more_once_undone(case: Case) -> None:
    model, _ = started(case)
    batch = {name: tensor for name, tensor in padded_inputs(model).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    model.generate(**batch, **options)
    undo(model)
    assert torch.equal(model.generate(**batch, **options), case.model(torch.float64).generate(**batch, **options))


@in_turn("llama", "gpt2")
def test_assisted_decoding_takes_tokens_back(case: Case) -> None:
    """The text repeats itself, so that there is something to guess, and wrongly."""
    model, step = started(case, equal=True)
    text = inputs(model, batch=1, length=6)["input_ids"].repeat(1, 2)
    options = {"max_new_tokens": 14, "do_sample": False}
    plain, cache = model.generate(text, **options), step.method.cache(step.site.layers)
    options |= {"prompt_lookup_num_tokens": 3}
    assert torch.equal(model.generate(text, **options, past_key_values=cache), plain)
    if isinstance(cache, PositionedCache):
        with pytest.raises(TautError, match="pass an empty cache of this recipe"):
            model.generate(text, **options)
    cache.reset()
    ids = inputs(model, length=LENGTH)["input_ids"]
    again, _ = stepwise(model, CHUNKS["in pieces"], cache, input_ids=ids)
    assert (again - logits(model, input_ids=ids, use_cache=False)).abs().max() <= TOLERANCE


@each("llama")
def test_a_cache_reset_is_as_new(case: Case) -> None:
    model, _ = started(case)
    ids = inputs(model, length=LENGTH)["input_ids"]
    expected, _ = stepwise(model, CHUNKS["long prompt"], input_ids=ids)
    _, cache = stepwise(model, CHUNKS["in pieces"], input_ids=ids.flip(1))
    cache.reset()
    again, _ = stepwise(model, CHUNKS["long prompt"], cache, input_ids=ids)
    assert torch.equal(again, expected)


@each("llama")
def test_copies_of_model_and_cache_are_independent(case: Case) -> None:
    model, _ = started(case)
    ids = inputs(model, length=LENGTH)["input_ids"]
    rest = [1, 1, 1, 4, 1, 6]
    expected, _ = stepwise(model, [10, *rest], input_ids=ids)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _, prefix = stepwise(twin, [10], input_ids=ids[:, :10])
    for _ in range(2):
        answer, _ = stepwise(twin, rest, copy.deepcopy(prefix), input_ids=ids[:, 10:])
        assert (answer - expected[:, 10:]).abs().max() <= TOLERANCE


@each("llama")
def test_predicted_bytes_are_held(case: Case) -> None:
    model, step = started(case)
    _, past = stepwise(model, CHUNKS["long prompt"], input_ids=inputs(model, batch=1, length=LENGTH)["input_ids"])
    check_held(past, step)
    layers = own(past).layers
    held = sum(value.nbytes for layer in layers for value in vars(layer).values() if isinstance(value, Tensor))
    cost = step.method.predict(step.site)
    share = layers[0].keys.shape[2] / step.method.entries(step.site)
    assert held == pytest.approx(cost.cache_bytes_per_token * LENGTH * share, rel=1e-12)
    assert held < step.site.dense().cache_bytes_per_token * LENGTH


@each("llama")
def test_gradients_flow(case: Case) -> None:
    """Through one pass, with a cache or without; through what is held, unless that is in few bits or was chosen."""
    model, step = started(case)
    ids = inputs(model, length=LENGTH)["input_ids"]
    direction = torch.randn(2, LENGTH, model.config.vocab_size, generator=torch.Generator().manual_seed(1)).double()

    def gradients(*stops: int, use_cache: bool = True) -> dict[str, Tensor]:
        model.zero_grad()
        past, total, start = None, 0.0, 0
        for stop in stops:
            output = model(input_ids=ids[:, start:stop], past_key_values=past, use_cache=use_cache)
            past, total = output.get("past_key_values"), total + (output["logits"] * direction[:, start:stop]).sum()
            start = stop
        total.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    whole, cached, pieces = gradients(LENGTH, use_cache=False), gradients(LENGTH), gradients(9, 10, 15, LENGTH)
    same = [cached] + [pieces] * (step.method.unequal is None and step.method.store is None)
    assert all(torch.allclose(way[name], whole[name], atol=1e-9, rtol=1e-9) for way in same for name in whole)
    assert all(gradient.isfinite().all() and gradient.any() for way in (whole, pieces) for gradient in way.values())
