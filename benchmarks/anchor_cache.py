"""Decoding behind a long prefix with an anchor cache, against full caches and against no prefix at all."""

import copy
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, against, options, record
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

import taut
from taut.generation.prefix import Prefix
from taut.measurement import memory, sandbox
from taut.measurement.clock import Timing, compare
from taut.measurement.count import cache_bytes
from taut.surgery.loading import open_model, resolve

MODEL = (
    "llama:hidden_size=512,num_hidden_layers=8,intermediate_size=1536,num_attention_heads=8,num_key_value_heads=8,"
    "vocab_size=8192,max_position_embeddings=8192,tie_word_embeddings=true"
)
PREFIXES, ANCHORS, STEPS, QUESTION, ANSWER = (256, 1024, 4096), 40, 16, 20, 256
DYNAMIC, STATIC, EMPTY, SCORING = 2.4, 1.6, 1.08, 20.0
CLAIM = (
    f"8 layers of width 512 behind {PREFIXES[-1]} tokens kept in {ANCHORS} anchors: a token {DYNAMIC}x faster than "
    f"with DynamicCache, {STATIC}x than with StaticCache, at most {EMPTY}x of the time behind one token; a question of "
    f"{QUESTION} tokens scored {SCORING:.0f}x faster than with the prefix read again"
)
NOTES = (
    f"time of {STEPS} tokens, one by one; random weights, as it does not matter what the tokens are. 'one token': the "
    "same model and memory behind a prefix of one token, which no cache can beat. 'anchors, int8' (on a CPU): weights "
    "in 8 bits as well, which lowers that floor. cache bytes: held before the first token. "
    f"{ANSWER} tokens after the question cost what decoding costs; 'read again' has a full DynamicCache then. peak "
    f"bytes, in fresh processes: the cache and what decoding {STEPS} tokens took beyond it and beyond what reading the "
    "prefix had used. rows: texts that share "
    "the prefix, each with a cache of its own. The targets are those of a CPU with two threads"
)
OURS, INT8 = ("anchors", "one token"), "anchors, int8"
TARGETS = {"DynamicCache": DYNAMIC, "StaticCache": STATIC, "one token": 1 / EMPTY, INT8: None}
"""What the anchors' time is compared with, and how many times faster it shall be."""


def prefix_of(length: int) -> Tensor:
    """(length,) ids with ANCHORS anchors, evenly, the last token among them."""
    ids = torch.arange(length) % 4000 + 100
    ids[torch.linspace(length / ANCHORS, length, ANCHORS).long() - 1] = 7
    return ids


def tried(device: str) -> dict[str, PreTrainedModel]:
    """The model of each kind of cache; on a CPU one with int8 weights, too."""
    torch.manual_seed(0)
    dense = open_model(resolve(MODEL), device=device)
    kept = {"memory": {"method": "anchor", "ids": [7], "longest": 0}}
    compressed = taut.apply(copy.deepcopy(dense), kept)
    models = {"DynamicCache": dense, "StaticCache": dense, "anchors": compressed, "one token": compressed}
    if device == "cpu":
        light = {slot: {"method": "low_bit"} for slot in ("embedding", "projection", "feedforward")}
        models[INT8] = taut.apply(copy.deepcopy(dense), light | kept)
    return models


def fresh(kind: str, model: PreTrainedModel, ids: Tensor, rows: int = 1) -> Callable[[], Cache]:
    """What gives a cache of this kind for ``rows`` texts, ready for the token after the prefix. Each call goes back to
    that state."""
    length = len(ids)
    if kind in (*OURS, INT8):
        kept = taut.prefix(model, ids[:1] if kind == "one token" else ids)
        return lambda: kept.cache(rows)
    dynamic = taut.prefix(model, ids).cache(rows)
    if kind == "DynamicCache":

        def back() -> Cache:
            if dynamic.get_seq_length() > length:
                dynamic.crop(length - dynamic.get_seq_length())
            return dynamic

        return back
    static = StaticCache(config=model.config, max_cache_len=length + STEPS)
    for full, layer in zip(dynamic.layers, static.layers, strict=True):
        layer.update(full.keys, full.values)

    def emptied() -> Cache:
        for layer in static.layers:
            layer.cumulative_length.fill_(length)
        return static

    return emptied


def decoding(model: PreTrainedModel, cache_of: Callable[[], Cache], first: int, rows: int = 1) -> Callable[[], None]:
    """STEPS tokens of each row, one at a time."""
    tokens = torch.arange(200, 200 + STEPS, device=model.device).view(STEPS, 1, 1).repeat(1, rows, 1)
    places = torch.arange(first, first + STEPS, device=model.device).view(STEPS, 1, 1)

    def run() -> None:
        cache = cache_of()
        for token, place in zip(tokens, places, strict=True):
            model(input_ids=token, past_key_values=cache, position_ids=place, use_cache=True)

    return run


def scoring(models: dict[str, PreTrainedModel], prefix: Tensor) -> dict[str, Callable[[], Any]]:
    """The logits of a question behind the prefix: everything read again, or the prefix's caches."""
    dense, compressed = models["DynamicCache"], models["anchors"]
    question = torch.arange(300, 300 + QUESTION, device=dense.device)[None]
    whole = torch.cat([prefix[None].to(dense.device), question], 1)
    full, anchors = taut.prefix(dense, prefix), taut.prefix(compressed, prefix)

    def behind(model: PreTrainedModel, kept: Prefix) -> Callable[[], Any]:
        held = kept.memory

        def run() -> Any:
            cache = held if kept is full else kept.cache()
            answer = model(input_ids=question, past_key_values=cache, use_cache=True)
            if kept is full:
                # A slice, where a copy would be timed.
                cache.crop(-QUESTION)
            return answer

        return run

    again = {"read again": lambda: dense(input_ids=whole, use_cache=True, logits_to_keep=QUESTION)}
    return again | {"full cache": behind(dense, full), "anchors": behind(compressed, anchors)}


@torch.inference_mode()
def peak(kind: str, length: int, rows: int, device: str) -> dict[str, Any]:
    """Bytes of the cache, and the most that decoding took beyond what was held before. For a process of its own."""
    # Two such processes side by side, each with two threads, would wait for each other most of the time.
    torch.set_num_threads(1)
    model = tried(device)[kind]
    cache_of = fresh(kind, model, prefix_of(length), rows)
    run = decoding(model, cache_of, length, rows)
    held = cache_bytes(cache_of())
    with memory.watch(device) as watched:
        run()
    return {"cache": held, "extra": watched.extra}


def remembered(count: int, arguments: Namespace) -> dict[str, Any]:
    """A row of the record that says what each kind of cache takes for ``count`` texts."""
    length = PREFIXES[0 if arguments.quick else -1]
    kinds = [kind for kind in (*TARGETS, "anchors") if kind != INT8 or arguments.device == "cpu"]
    asks = [{"kind": kind, "length": length, "rows": count, "device": arguments.device} for kind in kinds]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda ask: sandbox.call("anchor_cache:peak", ask).result, asks))
    sizes = {
        f"{kind}, peak bytes": found["cache"] + (found["extra"] or 0)
        for kind, found in zip(kinds, outcomes, strict=True)
    }
    return {"what": f"memory of {STEPS} tokens", "prefix": length, "rows": count} | sizes


def decoded(models: dict[str, PreTrainedModel], length: int, rows: int, threads: int, arguments: Namespace) -> tuple:
    """Rows of the record that compare a token with each kind of cache; and the times."""
    caches = {kind: fresh(kind, model, prefix_of(length), rows) for kind, model in models.items()}
    held = {kind: cache_bytes(cache_of()) for kind, cache_of in caches.items()}
    calls = {kind: decoding(models[kind], cache_of, length, rows) for kind, cache_of in caches.items()}
    repeats = 3 if arguments.quick else arguments.repeats
    times = compare(calls, repeats=repeats, threads=threads, device=arguments.device)
    wanted = length == PREFIXES[-1] and threads == 2 and arguments.device == "cpu"
    found = []
    for kind in (each for each in TARGETS if each in models):
        where = {"what": "a token", "prefix": length, "rows": rows, "threads": threads, "against": kind}
        row = against(times[kind], times["anchors"], TARGETS[kind] if wanted else None, **where)
        sizes = {"their cache bytes": held[kind], "our cache bytes": held["anchors"]}
        found.append(row | sizes | {"ms a token": times["anchors"].median * 1e3 / STEPS})
    return found, times


def asked(
    models: dict[str, PreTrainedModel], length: int, threads: int, token: dict[str, Timing], arguments: Namespace
) -> list[dict[str, Any]]:
    """Rows of the record that compare a question behind the prefix; with an answer, at the times of a ``token``."""
    calls, repeats = scoring(models, prefix_of(length)), 3 if arguments.quick else 6
    times = compare(calls, repeats=repeats, threads=threads, device=arguments.device)
    wanted = length == PREFIXES[-1] and threads == 2 and arguments.device == "cpu"
    found = []
    for name, target in (("read again", SCORING), ("full cache", None)):
        where = {"what": f"a question of {QUESTION}", "prefix": length, "rows": 1, "threads": threads, "against": name}
        found.append(against(times[name], times["anchors"], target if wanted else None, **where))
    kinds = {"read again": "DynamicCache", "full cache": "DynamicCache", "anchors": "anchors"}
    ends = {f"{name}, s": times[name].median + ANSWER / STEPS * token[kind].median for name, kind in kinds.items()}
    where = {"what": f"question and {ANSWER} tokens", "prefix": length, "rows": 1, "threads": threads}
    return [*found, where | ends]


@torch.inference_mode()
def main() -> int:
    arguments = options(CLAIM, repeats=15, rows=1)
    # Before this process takes memory of its own: a GPU's is shared.
    rows = [remembered(count, arguments) for count in sorted({1, arguments.rows})]
    models = tried(arguments.device)
    for length in PREFIXES[:1] if arguments.quick else PREFIXES:
        for threads in (1, 2) if arguments.device == "cpu" else (1,):
            found, token = decoded(models, length, 1, threads, arguments)
            rows += [*found, *asked(models, length, threads, token, arguments)]
            if arguments.rows > 1:
                rows += decoded(models, length, arguments.rows, threads, arguments)[0]
    if not arguments.quick and arguments.device == "cpu":
        draw(rows, RECORDS / "anchor_cache.png")
    passed = all(row.get("holds", True) for row in rows) if arguments.device == "cpu" else None
    return record("anchor_cache", CLAIM, rows, passed, NOTES, arguments.quick, arguments.device)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """How many times faster than each, by the length of the prefix, 2 threads."""
    import altair

    points = [
        {name: row[name] for name in ("prefix", "against")} | {"ratio": row["faster"].value}
        for row in rows
        if row.get("threads") == 2 and row["rows"] == 1 and row.get("against") not in (None, *OURS, INT8)
    ]
    chart = (
        altair.Chart(altair.Data(values=points), width=420, height=260, title="Behind a prefix kept in 40 anchors")
        .mark_line(point=True)
        .encode(
            altair.X("prefix:Q", scale=altair.Scale(type="log", base=2), title="prefix, tokens"),
            altair.Y("ratio:Q", scale=altair.Scale(type="log", domainMin=0.8, nice=False), title="times faster than"),
            altair.Color("against:N", title=None),
        )
    )
    chart.save(path, scale_factor=2)


if __name__ == "__main__":
    raise SystemExit(main())
