"""memory.compressive: two queues that move by the number of tokens read, against a slow reference without a cache."""

from collections import deque

import pytest
import torch
from decoding import CHUNKS, LENGTH, install
from slow_compression import slow_reference

from taut.contract.tiny import inputs, logits, stepwise, tiny
from taut.core.errors import TautError
from taut.core.site import MemorySite
from taut.methods.memory.compressive.method import Compressive
from taut.methods.memory.compressive.pooled_cache import CompressedCache
from taut.methods.memory.segment_recurrence.method import SegmentRecurrence
from taut.ops.caches.base import Incoming
from taut.ops.caches.queues import Compression

CPU = torch.device("cpu")
METHOD = Compressive.parse({"segment": 4, "memory": 3, "compressed": 2, "rate": 3})
METHODS = {
    "mean": METHOD,
    "max": Compressive.parse({"segment": 4, "memory": 3, "compressed": 2, "rate": 3, "pool": "max"}),
    "sliding": Compressive.parse({"segment": 1, "memory": 2, "compressed": 3, "rate": 2}),
    "all of it": Compressive.parse({"segment": 5, "memory": 0, "compressed": 9, "rate": 4}),
    "nothing compressed": Compressive.parse({"segment": 3, "memory": 4, "compressed": 0, "rate": 2}),
}
STORED = Compressive.parse({"segment": 4, "memory": 3, "compressed": 2, "rate": 3, "store": {"method": "low_bit"}})


def most(method: Compressive) -> int:
    return method.pattern().most


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_queues_are_first_in_first_out(method: Compressive, chunks: list[int]) -> None:
    knobs = method.knobs
    cache = CompressedCache(1, method.pattern(), "max")
    recent: list[int] = []
    older: deque[int] = deque(maxlen=knobs.compressed)
    evicted = read = 0
    for count in chunks:
        new = torch.arange(read, read + count).double().reshape(1, 1, -1, 1)
        cache.begin(Incoming(count, CPU))
        cache.layers[0].update(new, new)
        cache.finish()
        for token in range(read, read + count):
            recent.append(token)
            while (token + 1) % knobs.segment == 0 and len(recent) >= knobs.memory + knobs.rate:
                # Of integers that count tokens, the greatest of a group is its last one.
                older.append(recent[knobs.rate - 1])
                recent, evicted = recent[knobs.rate :], evicted + knobs.rate
        read += count
        assert cache.layers[0].keys.flatten().tolist() == [*older, *recent]
        border = read // knobs.segment * knobs.segment
        assert evicted // knobs.rate == max(0, border - knobs.memory) // knobs.rate
        assert len(older) == min(evicted // knobs.rate, knobs.compressed)
        assert len(older) + len(recent) < most(method)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen3"])
@pytest.mark.parametrize("method", [*METHODS.values(), STORED], ids=[*METHODS, "in 8 bits"])
def test_equals_the_slow_reference(family: str, method: Compressive) -> None:
    model = tiny(family, dtype=torch.float64)
    ids = inputs(model, length=LENGTH)["input_ids"]
    before = logits(model, input_ids=ids)
    expected = slow_reference(model, method, ids)
    assert (before - expected).abs().max() > 1e-3
    install(model, method)
    assert (logits(model, input_ids=ids, use_cache=False) - expected).abs().max() <= 1e-12
    for chunks in CHUNKS.values():
        assert (stepwise(model, chunks, input_ids=ids)[0] - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_one_into_one_is_a_longer_memory(pool: str) -> None:
    model = tiny("llama", dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    full = logits(model, **batch)
    undo = install(model, SegmentRecurrence.parse({"segment": 4, "memory": 8}))
    recurrence = logits(model, **batch, use_cache=False)
    undo()
    for compressed, expected in ((5, recurrence), (LENGTH, full)):
        knobs = {"segment": 4, "memory": 3, "compressed": compressed, "rate": 1, "pool": pool}
        undo = install(model, Compressive.parse(knobs))
        assert (logits(model, **batch, use_cache=False) - expected).abs().max() <= 1e-12
        assert (stepwise(model, CHUNKS["in pieces"], **batch)[0] - expected).abs().max() <= 1e-12
        undo()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_nothing_leaks_in_behind_what_was_dropped(family: str) -> None:
    """All that was seen is gone, nothing stands for it, and pieces of a segment follow."""
    model = tiny(family, dtype=torch.float64)
    install(model, Compressive.parse({"segment": 6, "memory": 0, "compressed": 0, "rate": 2}))
    ids = inputs(model, length=LENGTH)["input_ids"]
    whole = logits(model, input_ids=ids, use_cache=False)
    assert (stepwise(model, [6, 3, 3, 6, 2, 4], input_ids=ids)[0] - whole).abs().max() <= 1e-12


@pytest.mark.parametrize("cut", [1, 4, 8])
def test_crop_over_a_compression_equals_never_having_seen(cut: int) -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, METHOD)
    ids = inputs(model, length=LENGTH)["input_ids"]
    kept = 18 - cut
    wrong = torch.cat([ids[:, :kept], (ids[:, kept:18] + 1) % 90], 1)
    cache = METHOD.cache(2)
    cache.activate_past_recording()
    _, cache = stepwise(model, [10], cache, input_ids=wrong[:, :10])
    cache.crop(0)
    assert cache.layers[0].compressed > 0
    _, cache = stepwise(model, [5, 3], cache, input_ids=wrong[:, 10:])
    cache.crop(-cut)
    assert cache.get_seq_length() == kept
    rest, _ = stepwise(model, [1, LENGTH - kept - 1], cache, input_ids=ids[:, kept:])
    assert (rest - logits(model, input_ids=ids, use_cache=False)[:, kept:]).abs().max() <= 1e-12


def test_a_token_reaches_the_end_through_what_it_is_compressed_into() -> None:
    model = tiny("llama", dtype=torch.float64, num_hidden_layers=1)
    ids = inputs(model, batch=1, length=LENGTH)["input_ids"]

    def reached(method: Compressive | SegmentRecurrence) -> list[bool]:
        undo = install(model, method)
        vectors = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=vectors, use_cache=False)["logits"][0, -1].square().sum().backward()
        undo()
        return (vectors.grad[0].abs().sum(1) > 0).tolist()

    # The last query, at 23, is of the segment from 20: 17 tokens have left, 5 groups of 3 are compressed, 2 are seen.
    assert reached(METHOD) == [False] * 9 + [True] * 15
    assert reached(SegmentRecurrence.parse({"segment": 4, "memory": 3})) == [False] * 17 + [True] * 7


def test_positions_of_other_tokens_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """T5 adds a bias by distance, so there the position of a compressed entry matters by itself."""
    model = tiny("t5", dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    install(model, METHOD)
    whole = logits(model, **batch, use_cache=False)
    begin = CompressedCache.begin

    def shifted(cache: CompressedCache, incoming: Incoming) -> None:
        begin(cache, incoming)
        if cache.key_positions is not None:
            cache.key_positions = torch.where(cache.marks[1] & 1 == 1, 0, cache.key_positions)

    monkeypatch.setattr(CompressedCache, "begin", shifted)
    assert (stepwise(model, CHUNKS["in pieces"], **batch)[0] - whole).abs().max() > 1e-3


def test_what_cannot_be_served_is_told() -> None:
    model = tiny("llama")
    batch = inputs(model, batch=1)
    install(model, METHOD)
    with pytest.raises(TautError, match="packed sequences would be compressed together"):
        model(input_ids=batch["input_ids"], position_ids=(torch.arange(12) % 7)[None], use_cache=False)
    with pytest.raises(TautError, match="serves only the model"):
        tiny("llama")(**batch, past_key_values=METHOD.cache(2))
    model.train().gradient_checkpointing_enable()
    with pytest.raises(TautError, match="gradient checkpointing would fill its cache twice"):
        model(**batch)
    with pytest.raises(TautError, match="rate = 0"):
        Compressive.parse({"rate": 0})
    with pytest.raises(TautError, match="pool = 'median'"):
        Compressive.parse({"pool": "median"})


def test_cost_and_keep() -> None:
    site = MemorySite(slot="memory", path="model", layers=2, key_heads=2, head_width=8, position="rope", length=100)
    assert METHOD.entries(site) == Compression(4, 3, 2, 3).most == 4 + 3 + 2 + 2
    assert METHOD.predict(site).cache_bytes_per_token == site.dense().cache_bytes_per_token * 0.11
    # Eight numbers, a scale and a bias are 16 bytes instead of 32.
    assert STORED.predict(site).cache_bytes_per_token == site.dense().cache_bytes_per_token * 0.11 / 2
    general = Compressive.parse({"segment": 10, "compressed": 15, "rate": 4}, 0.5)
    assert general.solve(site, 0.5).entries(site) == 50
    with pytest.raises(TautError, match=r"the least keep is 0\.2800"):
        general.solve(site, 0.2)
