"""memory.low_bit, and ``store:`` of a bounded cache: what is attended is what is held, however the text comes in."""

from pathlib import Path

import pytest
import torch
from decoding import CHUNKS, DECODERS, LENGTH, install, own
from slow_memory import slowly
from torch import Tensor

from taut.architectures.locate import locate
from taut.contract.tiny import inputs, logits, stepwise, tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.site import MemorySite
from taut.generation.prefix import Prefix, read
from taut.methods.base import MemoryMethod
from taut.methods.memory.low_bit import LowBit
from taut.methods.memory.window_sink import WindowSink
from taut.methods.store import Store
from taut.ops.attention.masks import Causal, Pattern
from taut.ops.caches.quantized import expanded, packed, rounded
from taut.surgery.apply import apply
from taut.surgery.plan import make_plan

METHODS: dict[str, MemoryMethod] = {
    "8 bits": LowBit.parse({}),
    "4 bits": LowBit.parse({"bits": 4}),
    "3 bits in groups": LowBit.parse({"bits": 3, "group": 3, "clip": True}),
    "window in 8 bits": WindowSink.parse({"sinks": 2, "window": 5, "store": {"method": "low_bit", "bits": 8}}),
    "window in 4 bits": WindowSink.parse({"sinks": 2, "window": 5, "store": {"method": "low_bit", "bits": 4}}),
}
EACH_METHOD = pytest.mark.parametrize("name", METHODS)


def as_rule(pattern: Pattern | None) -> object:
    def rule(query: Tensor, key: Tensor, scaling: float) -> Tensor:
        places = torch.arange(key.shape[2])
        return (pattern or Causal()).allowed(places, places)[None, None]

    return rule


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("group", [None, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_are_packed_and_expanded(bits: int, group: int | None, dtype: torch.dtype) -> None:
    store = Store(bits=bits, group=group, clip=False)
    states = torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    held = packed(states, store)
    assert held.shape == (2, 3, 7, store.bytes((16,)))
    again = expanded(held, store, 16, dtype)
    assert torch.equal(again, rounded(states, store))
    formula = store.unpack(store.pack(states), states.shape, dtype)
    assert torch.allclose(again, formula, rtol=0, atol=1e-6 if dtype != torch.bfloat16 else 2**-6)
    parts = states.unflatten(-1, (-1, 8)) if group == 8 else states[..., None, :]
    steps = (parts.amax(-1) - parts.amin(-1)).double() / (2**bits - 1)
    if group != 5:
        slack = 1.01 * steps / 2 + (2**-7 if dtype == torch.bfloat16 else 4e-3)
        assert ((again - states).view(parts.shape).abs().amax(-1) <= slack).all()


@pytest.mark.parametrize("family", [family for family in DECODERS if family != "gemma3"])
@EACH_METHOD
def test_one_pass_is_the_rounding_and_steps_are(family: str, name: str) -> None:
    model, method = tiny(family, dtype=torch.float64), METHODS[name]
    batch = inputs(model, length=LENGTH)
    original = logits(model, **batch, use_cache=False)
    with slowly(model, as_rule(method.pattern()), method.store):
        expected = logits(model, **batch, use_cache=False)
    assert not torch.allclose(expected, original, atol=1e-3)
    install(model, method)
    assert (logits(model, **batch, use_cache=False) - expected).abs().max() <= 1e-12
    for chunking in CHUNKS if family == "llama" else ("in pieces",):
        steps, past = stepwise(model, CHUNKS[chunking], **batch)
        assert (steps - expected).abs().max() <= 1e-12
        assert all(layer.keys.dtype == layer.values.dtype == torch.uint8 for layer in own(past).layers)


@EACH_METHOD
def test_predicted_bytes_are_held(name: str) -> None:
    model = tiny("llama")
    site = next(site for site in locate(model, LENGTH).sites if isinstance(site, MemorySite))
    install(model, METHODS[name])
    _, past = stepwise(model, CHUNKS["long prompt"], input_ids=inputs(model, batch=1, length=LENGTH)["input_ids"])
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in past.layers)
    assert held == METHODS[name].predict(site).cache_bytes_per_token * LENGTH
    assert held < site.dense().cache_bytes_per_token * LENGTH


@pytest.mark.parametrize("length", [4, 14])
@pytest.mark.parametrize(
    "line",
    [
        {"method": "key_norm", "entries": 6, "store": {"method": "low_bit", "bits": 8}},
        {"method": "attention_score", "entries": 6},
        {"method": "window_sink", "sinks": 2, "window": 5, "store": {"method": "low_bit", "bits": 4}},
        {"method": "low_bit"},
    ],
    ids=["key_norm", "attention_score", "window_sink", "low_bit"],
)
def test_a_prefix_goes_through_a_file(line: dict, length: int, tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float64)
    apply(model, Recipe.parse({"memory": line}))
    ids = inputs(model, batch=1, length=LENGTH)["input_ids"]
    expected, _ = stepwise(model, [length, 1, LENGTH - length - 1], input_ids=ids)
    read(model, ids[0, :length]).save(tmp_path / "prefix")
    again = Prefix.load(tmp_path / "prefix", model)
    for _ in range(2):
        rest, _ = stepwise(model, [1, LENGTH - length - 1], again.cache(), input_ids=ids[:, length:])
        assert (rest - expected[:, length:]).abs().max() <= 1e-12


def test_bytes_at_a_usual_width() -> None:
    site = MemorySite(
        slot="memory", path="model", layers=2, key_heads=2, head_width=64, position="rope", length=100, dtype="float32"
    )
    dense = site.dense().cache_bytes_per_token
    assert LowBit.parse({}).predict(site).cache_bytes_per_token / dense == 72 / 256
    assert LowBit.parse({"bits": 4}).predict(site).cache_bytes_per_token / dense == 36 / 256
    assert LowBit.parse({"bits": 4, "group": 32}).predict(site).cache_bytes_per_token / dense == 40 / 256


def test_recipes_say_it_and_wrong_ones_are_told() -> None:
    model = tiny("llama")
    line = {"method": "window_sink", "window": 8, "store": {"method": "low_bit", "bits": 4}}
    step = make_plan(model, Recipe.parse({"memory": line})).steps[0]
    assert step.method.store == Store(bits=4, clip=False)
    assert "store=4 bits" in step.label
    again = WindowSink.parse(step.to_dict()["knobs"])
    assert again.knobs == step.method.knobs
    searched = WindowSink.parse({"store": {"method": "low_bit", "clip": True}})
    assert searched.store.clip
    with pytest.raises(TautError, match=r"store\.bits = 5"):
        WindowSink.parse({"store": {"method": "low_bit", "bits": 5}})
    with pytest.raises(TautError, match="does not nest a store"):
        make_plan(model, Recipe.parse({"memory": {"method": "low_bit", "store": {"method": "low_bit"}}}))
    with pytest.raises(TautError, match=r"torch\.float16 that are not finite"):
        packed(torch.full((1, 1, 1, 8), torch.inf, dtype=torch.float16), Store())
