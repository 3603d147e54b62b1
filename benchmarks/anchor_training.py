"""A small decoder trained with anchors and without, on the same budget: what does it cost, and what do anchors carry?

Two models learn a language: one under full attention, one under the anchors' mask; and the first is also judged under
that mask without having seen it. Then both go on with texts of keys and values, of which one is asked for segments
later. (From random weights, full attention finds no way to look a key up for thousands of steps; a model that has read
some text does in hundreds.)

Every finished model is kept in ``--folder``, and a run that is cut off goes on where it was, so the same command may be
stopped and repeated. Needs TAUT_DATA for the text.
"""

import math
import random
from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import options, record
from transformers import AutoTokenizer

import taut
from taut import data
from taut.evaluation.tasks.key_value_recall import documents

LOSS, RECALL, SHARE, LEARNED = 1.03, 0.02, 1 / 8, 0.9
"""The last: from where on full attention has learned to look up. Below it, being as good says nothing."""
CLAIM = (
    f"trained with anchors: held-out loss at most {LOSS}x that of full attention on the same budget, and key-value "
    f"recall within {RECALL:.0%} of it with at most 1/{1 / SHARE:.0f} of the cache"
)
ANCHORS: dict[str, Any] = {"memory": {"method": "anchor", "anchors": [".", "!", "?"], "longest": 64}}
KINDS: dict[str, dict[str, Any]] = {"full attention": {}, "anchors": ANCHORS}
LATE = "full attention, anchors' mask at test time"
PAIRS, FILLERS, QUESTIONS = 8, 6, 24
LESSONS = (1, 2, 4, PAIRS)
"""Pairs of the texts that are learned from, as many of each kind; asked are those with the most."""
HELD = 32
"""One part in so many of every text judges."""


def language(folder: Path, arguments: Namespace) -> tuple[dict[str, Any], Path]:
    """The spec of a language model, and the text that it is judged on: the end of each text there is."""
    learned, held_out = folder / "learned.txt", folder / "held_out.txt"
    if not held_out.is_file():
        pieces: list[tuple[str, str]] = []
        for name in arguments.text.split(","):
            whole = "\n\n".join(row[0] for row in data.documents(name).rows)
            cut = whole.rindex("\n", 0, len(whole) * (HELD - 1) // HELD)
            pieces.append((whole[:cut], whole[cut:]))
        for path, texts in zip((learned, held_out), zip(*pieces, strict=True), strict=True):
            path.write_text("\n\n".join(texts))
    spec = {
        "model": f"llama:hidden_size={arguments.width},num_hidden_layers={arguments.layers},"
        f"intermediate_size={4 * arguments.width},num_attention_heads={arguments.width // 32},"
        f"max_position_embeddings={arguments.length},tie_word_embeddings=true",
        "tokenizer": f"bpe:{arguments.vocabulary}",
        "text": str(learned),
        "length": arguments.length,
        "batch": arguments.batch,
        "learning_rate": arguments.rate,
        "precision": arguments.precision,
        "budget": {"steps": arguments.steps},
        "evaluate": {"text": str(held_out), "every": 0.25, "tokens": 50_000},
    }
    return spec, held_out


def recall(folder: Path, arguments: Namespace) -> dict[str, Any]:
    """The spec of learning to find values by keys, from texts of seeds that no evaluation has; it lacks the model."""
    learned = folder / "pairs.txt"
    if not learned.is_file():
        draw = random.Random(1)
        # Looking up one of two is learned soon, and one of eight then.
        lessons = [documents(arguments.texts // len(LESSONS), pairs, FILLERS, pairs, between="") for pairs in LESSONS]
        learned.write_text("\n\n".join(_asked(text, draw) for each in zip(*lessons, strict=True) for text, *_ in each))
    return {
        "text": str(learned),
        "length": min(arguments.length, 256),
        "pack": False,
        "batch": 4 * arguments.batch,
        "learning_rate": arguments.rate / 2,
        "precision": arguments.precision,
        "budget": {"steps": arguments.recall_steps},
        "evaluate": {"share": 0.01, "every": 0.1, "tokens": 20_000},
    }


def _asked(text: str, draw: random.Random) -> str:
    """A text and several of its keys once more, with their values."""
    pairs = [segment.split()[:2] for segment in text.split(". ")]
    return " ".join([text, *(f"{' '.join(pair)}." for pair in draw.choices(pairs, k=QUESTIONS))])


def train(spec: dict[str, Any], out: Path, device: str) -> dict[str, Any]:
    """The record of one run, or of what it gave before."""
    torch.set_num_threads(1)
    done = taut.train(spec, out, device=device)
    if done.status != "done":
        raise SystemExit(f"{out}: {done.status}: the same command goes on")
    return done.record


def trained(specs: dict[str, dict[str, Any]], outs: dict[str, Path], device: str) -> dict[str, dict[str, Any]]:
    """The records of both models' runs, side by side."""
    with ProcessPoolExecutor(len(specs), mp_context=get_context("spawn")) as pool:
        return dict(zip(specs, pool.map(train, specs.values(), outs.values(), repeat(device)), strict=True))


def judged(name: str, outs: dict[str, Path], task: str, device: str, **chosen: Any) -> Iterator[dict[str, Any]]:
    """A row for each: both models, and the full one under the mask."""
    tokenizer = AutoTokenizer.from_pretrained(outs["anchors"])
    models = {kind: taut.load(folder, device=device) for kind, folder in outs.items()}
    models[LATE] = taut.apply(taut.load(outs["full attention"], device=device), ANCHORS, tokenizer=tokenizer)
    text = documents(1, PAIRS, FILLERS, 0, between="")[0][0]
    for kind, model in models.items():
        score = taut.evaluate(model, task, tokenizer=tokenizer, **chosen)[0].quantity
        kept = taut.prefix(model, text, tokenizer=tokenizer)
        yield {
            "experiment": name,
            "model": kind,
            "parameters": model.num_parameters(),
            "score": score,
            "cache": f"{kept.entries} of {len(kept.ids)}",
            "share": kept.entries / len(kept.ids),
        }


def main() -> int:
    arguments = options(
        CLAIM,
        folder="runs/anchor_training",
        text="text,builtin",
        width=256,
        layers=4,
        vocabulary=4096,
        length=512,
        batch=8,
        rate=2e-3,
        precision="float32",
        steps=500,
        texts=32_000,
        recall_steps=500,
        limit=400_000,
    )
    if arguments.quick:
        small = {
            "width": 32,
            "layers": 1,
            "vocabulary": 600,
            "length": 256,
            "steps": 8,
            "texts": 800,
            "recall_steps": 4,
        }
        small |= {"batch": 4, "limit": 20_000, "text": "builtin", "folder": f"{arguments.folder}-quick"}
        arguments = Namespace(**{**vars(arguments), **small})
    folder = Path(arguments.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    spec, held_out = language(folder, arguments)
    outs = {kind: folder / f"language-{kind.split()[0]}" for kind in KINDS}
    runs = trained({kind: spec | {"recipe": recipe} for kind, recipe in KINDS.items()}, outs, arguments.device)
    for_text = {"data": str(held_out), "max_length": arguments.length, "limit": arguments.limit}
    rows = [*judged("language", outs, "perplexity", arguments.device, **for_text)]
    for kind, row in zip(KINDS, rows, strict=False):
        row |= {name: runs[kind]["spent"][name] for name in ("tokens", "seconds")}
    full, anchored, late = (math.log(row["score"].value) for row in rows)
    rows[1] |= {"target": LOSS, "ratio": anchored / full, "holds": anchored <= LOSS * full}
    rows[2] |= {"ratio": late / full}

    spec = recall(folder, arguments)
    specs = {kind: spec | {"model": str(outs[kind])} for kind in KINDS}
    outs = {kind: folder / f"recall-{kind.split()[0]}" for kind in KINDS}
    runs = trained(specs, outs, arguments.device)
    questions = {
        "limit": 20 if arguments.quick else 500,
        "pairs": PAIRS,
        "fillers": FILLERS,
        "between": "",
        "cached": 64,
    }
    found = [*judged("recall", outs, "key_value_recall", arguments.device, **questions)]
    for kind, row in zip(KINDS, found, strict=False):
        row |= {name: runs[kind]["spent"][name] for name in ("tokens", "seconds")}
    right, kept = found[0]["score"].value, found[1]
    as_good = kept["score"].value >= right - RECALL and kept["share"] <= SHARE
    kept |= {"target": right - RECALL, "holds": as_good and right >= LEARNED}
    notes = (
        f"language: perplexity, 'ratio' is of losses in nats; recall: accuracy, read through the cache; chance is "
        f"{1 / PAIRS:.3f}, and it holds only where full attention reaches {LEARNED}. cache: entries after one text of "
        f"{PAIRS} segments of {FILLERS + 2} words. tokens and seconds of training, both models at once. Learned from: "
        f"{arguments.text}"
    )
    passed = all(row.get("holds", True) for row in rows + found)
    return record("anchor_training", CLAIM, rows + found, passed, notes, arguments.quick, arguments.device)


if __name__ == "__main__":
    raise SystemExit(main())
