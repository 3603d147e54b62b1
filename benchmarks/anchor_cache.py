"""Decoding behind a long prefix with an anchor cache, against full caches and against no prefix at all."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RECORDS, against, options, record
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache

import taut
from taut.generation.prefix import Prefix
from taut.measurement.clock import compare
from taut.measurement.count import cache_bytes
from taut.surgery.source import open_model, resolve

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
    "same model and memory behind a prefix of one token, which no cache can beat. 'anchors, int8': "
    "weights in 8 bits as well, which lowers that floor. cache bytes: held before the first "
    f"token. {ANSWER} tokens after the question cost what decoding costs; 'read again' has a full DynamicCache then"
)
OURS = ("anchors", "one token", "anchors, int8")


def prefix_of(length: int) -> Tensor:
    """(length,) ids with ANCHORS anchors, evenly, the last token among them."""
    ids = torch.arange(length) % 4000 + 100
    ids[torch.linspace(length / ANCHORS, length, ANCHORS).long() - 1] = 7
    return ids


def caches(models: dict[str, PreTrainedModel], ids: Tensor) -> dict[str, Callable[[], Cache]]:
    """A cache of each kind, ready for the token after the prefix. Each call goes back to that state."""
    length = len(ids)
    dynamic = taut.prefix(models["DynamicCache"], ids).memory
    static = StaticCache(config=models["StaticCache"].config, max_cache_len=length + STEPS)
    for full, layer in zip(dynamic.layers, static.layers, strict=True):
        layer.update(full.keys, full.values)
    ours = {name: taut.prefix(models[name], ids[:1] if name == "one token" else ids) for name in OURS}

    def fresh_dynamic() -> Cache:
        if dynamic.get_seq_length() > length:
            dynamic.crop(length - dynamic.get_seq_length())
        return dynamic

    def fresh_static() -> Cache:
        for layer in static.layers:
            layer.cumulative_length.fill_(length)
        return static

    kinds = {"DynamicCache": fresh_dynamic, "StaticCache": fresh_static}
    return kinds | {name: prefix.cache for name, prefix in ours.items()}


def decoding(model: PreTrainedModel, fresh: Callable[[], Cache], first: int, steps: int) -> Callable[[], None]:
    """``steps`` tokens, one at a time."""
    tokens = torch.arange(200, 200 + steps).view(steps, 1, 1)

    def run() -> None:
        cache = fresh()
        for place, token in enumerate(tokens, first):
            model(input_ids=token, past_key_values=cache, position_ids=torch.tensor([[place]]), use_cache=True)

    return run


def scoring(dense: PreTrainedModel, tightened: PreTrainedModel, prefix: Tensor) -> dict[str, Callable[[], Any]]:
    """The logits of a question behind the prefix: everything read again, or the prefix's caches."""
    question = torch.arange(300, 300 + QUESTION)[None]
    whole = torch.cat([prefix[None], question], 1)
    full, anchors = taut.prefix(dense, prefix), taut.prefix(tightened, prefix)

    def behind(model: PreTrainedModel, kept: Prefix) -> Callable[[], Any]:
        memory = kept.memory

        def run() -> Any:
            cache = memory if kept is full else kept.cache()
            answer = model(input_ids=question, past_key_values=cache, use_cache=True)
            if kept is full:
                # A slice, where a copy would be timed.
                cache.crop(-QUESTION)
            return answer

        return run

    again = {"read again": lambda: dense(input_ids=whole, use_cache=True, logits_to_keep=QUESTION)}
    return again | {"full cache": behind(dense, full), "anchors": behind(tightened, anchors)}


@torch.inference_mode()
def main() -> int:
    given = options(CLAIM, repeats=15)
    torch.manual_seed(0)
    dense = open_model(resolve(MODEL))
    memory = {"memory": {"method": "anchor", "ids": [7], "longest": 0}}
    tightened = taut.apply(copy.deepcopy(dense), memory)
    light = {slot: {"method": "low_bit"} for slot in ("embedding", "projection", "feedforward")}
    models = {"DynamicCache": dense, "StaticCache": dense, "anchors": tightened, "one token": tightened}
    models["anchors, int8"] = taut.apply(copy.deepcopy(dense), light | memory)
    rows, figure = [], []
    for length in PREFIXES[:1] if given.quick else PREFIXES:
        kinds = caches(models, prefix_of(length))
        held = {name: cache_bytes(fresh()) for name, fresh in kinds.items()}
        for threads in (1, 2):
            calls = {name: decoding(models[name], fresh, length, STEPS) for name, fresh in kinds.items()}
            times = compare(calls, repeats=3 if given.quick else given.repeats, threads=threads)
            wanted = length == PREFIXES[-1] and threads == 2
            targets = {"DynamicCache": DYNAMIC, "StaticCache": STATIC, "one token": 1 / EMPTY, "anchors, int8": None}
            for name, target in targets.items():
                where = {"what": "a token", "prefix": length, "threads": threads, "against": name}
                row = against(times[name], times["anchors"], target if wanted else None, **where)
                sizes = {"their cache bytes": held[name], "our cache bytes": held["anchors"]}
                rows.append(row | sizes | {"ms a token": times["anchors"].median * 1e3 / STEPS})
                figure.append({"prefix": length, "threads": threads, "against": name, "ratio": row["faster"].value})
            asked = scoring(dense, tightened, prefix_of(length))
            questions = compare(asked, repeats=3 if given.quick else 6, threads=threads)
            times |= {f"question: {name}": each for name, each in questions.items()}
            ours = times["question: anchors"]
            for name, target in (("read again", SCORING), ("full cache", None)):
                where = {"what": f"a question of {QUESTION}", "prefix": length, "threads": threads, "against": name}
                row = against(times[f"question: {name}"], ours, target if wanted else None, **where)
                rows.append(row)
                figure.append({"prefix": length, "threads": threads, "against": name, "ratio": row["faster"].value})
            token = {"read again": "DynamicCache", "full cache": "DynamicCache", "anchors": "anchors"}
            ends = {
                name: times[f"question: {name}"].median + ANSWER / STEPS * times[kind].median
                for name, kind in token.items()
            }
            rows.append(
                {"what": f"question and {ANSWER} tokens", "prefix": length, "threads": threads}
                | {f"{name}, s": seconds for name, seconds in ends.items()}
            )
    if not given.quick:
        draw(figure, RECORDS / "anchor_cache.png")
    return record("anchor_cache", CLAIM, rows, all(row.get("holds", True) for row in rows), NOTES, given.quick)


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """How many times faster than each, by the length of the prefix, 2 threads."""
    import altair

    shown = [point for point in points if point["threads"] == 2 and point["against"] not in OURS]
    chart = (
        altair.Chart(altair.Data(values=shown), width=420, height=260, title="Behind a prefix kept in 40 anchors")
        .mark_line(point=True)
        .encode(
            altair.X("prefix:Q", scale=altair.Scale(type="log", base=2), title="prefix, tokens"),
            altair.Y("ratio:Q", scale=altair.Scale(type="log"), title="times faster than"),
            altair.Color("against:N", title=None),
        )
    )
    chart.save(path, scale_factor=2)


if __name__ == "__main__":
    raise SystemExit(main())
