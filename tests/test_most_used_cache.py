"""memory.compressive, pool: most_used: against a slow reference that follows every head of every row by itself."""

import copy
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from decoding import CHUNKS, LENGTH, install, own
from slow_memory import by_heads, slowly
from torch import Tensor

from taut.architectures.locate import locate
from taut.contract.tiny import inputs, logits, padded_inputs, stepwise, tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.site import MemorySite
from taut.generation.prefix import Prefix, read
from taut.methods.memory.compressive.method import Compressive
from taut.methods.memory.compressive.most_used_cache import UsedCache
from taut.surgery.apply import apply

LINE = {"segment": 4, "memory": 3, "compressed": 2, "rate": 3, "pool": "most_used"}
METHODS = {
    "most used": Compressive.parse(LINE),
    "pairs": Compressive.parse({"segment": 1, "memory": 2, "compressed": 3, "rate": 2, "pool": "most_used"}),
    "none kept": Compressive.parse(LINE | {"compressed": 0}),
    "in 8 bits": Compressive.parse(LINE | {"store": {"method": "low_bit", "bits": 8}}),
}
METHOD = METHODS["most used"]
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
PIECES = CHUNKS | {"segments": [4] * 6}


@dataclass(frozen=True)
class MostUsed:
    """Who sees whom, for a text that came in ``chunks``. ``places``: the place of each chosen one in its group."""

    method: Compressive
    chunks: list[int]
    places: set[int] = field(default_factory=set)

    def __call__(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        return by_heads(self._one_head, query, key, scaling)

    def _one_head(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """(G, T, K), (T, K) -> (T, T)."""
        knobs = self.method.knobs
        allowed = torch.zeros(len(key), len(key), dtype=torch.bool)
        recent: list[int] = []
        older: deque[int] = deque(maxlen=knobs.compressed)
        received: dict[int, list[float]] = {place: [] for place in range(len(key))}
        for stop, count in zip(accumulate(self.chunks), self.chunks, strict=True):
            for place in range(stop - count, stop):
                recent.append(place)
                seen = [*older, *recent]
                allowed[place, seen] = True
                weights = (query[:, place] @ key[seen].T * scaling).softmax(-1).sum(0)
                for other, weight in zip(seen, weights.tolist(), strict=True):
                    received[other].append(weight)
            border = stop // knobs.segment * knobs.segment
            while recent and recent[0] + knobs.rate <= border - knobs.memory:
                group, recent = recent[: knobs.rate], recent[knobs.rate :]
                best = max(group, key=lambda place: sum(received[place]) / len(received[place]))
                self.places.add(group.index(best))
                older.append(best)
        return allowed


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("chunking", PIECES)
@EACH
def test_equals_the_slow_reference(family: str, chunking: str, method: Compressive) -> None:
    model = tiny(family, dtype=torch.float64)
    ids = inputs(model, length=LENGTH)["input_ids"]
    rule = MostUsed(method, PIECES[chunking])
    with slowly(model, rule, method.store):
        expected = logits(model, input_ids=ids, use_cache=False)
    assert rule.places == set(range(method.knobs.rate))
    install(model, method)
    steps, past = stepwise(model, PIECES[chunking], input_ids=ids)
    assert (steps - expected).abs().max() <= 1e-12
    assert isinstance(past, UsedCache)
    assert all(layer.keys.shape[2] == layer.scores.shape[2] < method.compression.most for layer in past.layers)


def test_one_pass_compresses_nothing() -> None:
    model = tiny("llama", dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    full = logits(model, **batch)
    install(model, METHOD)
    assert torch.equal(logits(model, **batch, use_cache=False), full)
    assert (logits(model, **batch) - full).abs().max() <= 1e-12
    assert METHOD.pattern() is None
    assert "depends on where the text was cut" in METHOD.unequal
    assert Compressive.parse({}).unequal is None


@pytest.mark.parametrize("pads", [1, 6, 17])
@EACH
def test_left_padded_rows_equal_the_rows_alone(pads: int, method: Compressive) -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, method)
    batch = inputs(model, length=LENGTH)
    ids = batch["input_ids"]
    batch["attention_mask"][1, :pads] = 0
    batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    for chunks in ([pads, 1, LENGTH - pads - 1], [pads + 1] + [1] * (LENGTH - pads - 1)):
        together, _ = stepwise(model, chunks, **batch)
        other, _ = stepwise(model, chunks, input_ids=ids[:1])
        mine = [chunks[1], chunks[2]] if chunks[0] == pads else [1] * (LENGTH - pads)
        alone, _ = stepwise(model, mine, input_ids=ids[1:, pads:])
        assert (together[1:, pads:] - alone).abs().max() <= 1e-12
        assert (together[:1] - other).abs().max() <= 1e-12


@EACH
def test_rows_move_with_what_they_have_counted(method: Compressive) -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, method)
    ids = inputs(model, batch=3, length=LENGTH)["input_ids"]
    whole, _ = stepwise(model, [9, *[1] * 15], input_ids=ids)
    _, cache = stepwise(model, [9], input_ids=ids[:, :9])
    order = torch.tensor([2, 0, 0, 1])
    moved = copy.deepcopy(cache)
    moved.batch_select_indices(order)
    rest, _ = stepwise(model, [1] * 15, moved, input_ids=ids[order, 9:])
    assert (rest - whole[order, 9:]).abs().max() <= 1e-12
    moved = copy.deepcopy(cache)
    moved.batch_repeat_interleave(2)
    moved.reorder_cache(torch.tensor([5, 4, 0, 1, 2, 3]))
    order = torch.tensor([2, 2, 0, 0, 1, 1])
    rest, _ = stepwise(model, [1] * 15, moved, input_ids=ids[order, 9:])
    assert (rest - whole[order, 9:]).abs().max() <= 1e-12
    cache.reset()
    again, _ = stepwise(model, [9, *[1] * 15], cache, input_ids=ids)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_obeys(family: str, beams: int) -> None:
    model = tiny(family)
    batch = {name: tensor for name, tensor in padded_inputs(model).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "num_beams": beams}
    expected = model.generate(**batch, **options)
    undo = install(model, METHOD)
    ours = model.generate(**batch, **options, return_dict_in_generate=True)
    assert isinstance(own(ours.past_key_values), UsedCache)
    assert own(ours.past_key_values).layers[0].compressed > 0
    # A row in a batch of others, beams and all, is the row alone.
    alone = model.generate(**{name: tensor[:1] for name, tensor in batch.items()}, **options)
    assert torch.equal(ours.sequences[:1], alone)
    undo()
    assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize("length", [4, 14])
def test_a_prefix_goes_through_a_file(length: int, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float64)
    apply(model, Recipe.parse({"memory": {"method": "compressive", **LINE}}))
    ids = inputs(model, batch=1, length=LENGTH)["input_ids"]
    expected, _ = stepwise(model, [length, 1, LENGTH - length - 1], input_ids=ids)
    read(model, ids[0, :length]).save(tmp_path / "prefix")
    again = Prefix.load(tmp_path / "prefix", model)
    for _ in range(2):
        rest, _ = stepwise(model, [1, LENGTH - length - 1], again.cache(), input_ids=ids[:, length:])
        assert (rest - expected[:, length:]).abs().max() <= 1e-12


def test_scores_cost_and_what_cannot_be_served_is_told() -> None:
    model = tiny("llama")
    site = next(site for site in locate(model, 100).sites if isinstance(site, MemorySite))
    mean = Compressive.parse({key: value for key, value in LINE.items() if key != "pool"})
    both = METHOD.predict(site).cache_bytes_per_token, mean.predict(site).cache_bytes_per_token
    assert both[0] - both[1] == pytest.approx(4 * site.layers * site.key_heads * METHOD.entries(site) / 100)
    assert METHOD.predict(site).parameters == 0
    install(model, METHOD)
    batch = inputs(model, batch=1)
    with pytest.raises(TautError, match="cannot take tokens back"):
        model.generate(**batch, max_new_tokens=14, prompt_lookup_num_tokens=3, past_key_values=METHOD.cache(2))
    _, cache = stepwise(model, [5], input_ids=batch["input_ids"][:, :5])
    with pytest.raises(TautError, match="cannot take tokens back"):
        cache.crop(-1)
    with pytest.raises(TautError, match="serves only the model"):
        tiny("llama")(**batch, past_key_values=METHOD.cache(2))
    with pytest.raises(TautError, match="biases scores by distance"):
        apply(tiny("t5"), Recipe.parse({"memory": {"method": "compressive", **LINE}}))
