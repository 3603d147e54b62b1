"""Records as a study leaves them, made up with a fixed seed: no model, no torch."""

import math
import random
from statistics import median
from typing import Any

from taut.core.record import Quantity, Record, Score
from taut.core.spec import TrialSpec
from taut.studies.study import DENSE, IDENTITY

DATA = {"source": "built in: pydoc_data.topics", "split": "all", "items": "120", "sha256": "ab" * 32}


def spec(name: str = "dense", recipe: dict[str, Any] | None = None, **fields: Any) -> TrialSpec:
    fields = {"study": "sample", "model": "minilm", "tasks": ({"name": "docs_retrieval"},)} | fields
    return TrialSpec(recipe_name=name, recipe=recipe or {}, **fields)


def record(
    trial: TrialSpec | None = None, loss: float = 0.0, size: float = 90.9e6, time: float = 1.0, **rest: Any
) -> Record:
    """A finished trial with 120 items, ``loss`` lower on average than dense, and 20 interleaved timings."""
    trial = trial or spec()
    items, noise = random.Random(0), random.Random(trial.id)
    base = [items.random() ** 0.7 for _ in range(120)]
    samples = [value - noise.gauss(loss, 2 * loss + 0.01) if loss else value for value in base]
    ratios = [time * noise.gauss(1, 0.01) for _ in range(20)]
    ordered = sorted(ratios)
    costs = {
        "stored_bytes": Quantity(value=size, unit="B", how="counted, ties once"),
        "latency_prefill": Quantity(
            value=0.0213 * time,
            unit="s",
            how="median of 20 interleaved samples",
            samples=tuple(0.0213 * r for r in ratios),
        ),
        "peak_bytes": Quantity(value=None, unit="B", how="not asked for"),
    }
    if trial.recipe:
        costs["latency_prefill_ratio"] = Quantity(
            value=median(ratios),
            unit="x",
            how="median of paired ratios",
            samples=tuple(ratios),
            low=ordered[5],
            high=ordered[14],
        )
    score = Score(
        task="docs_retrieval",
        metric="mrr@10",
        better="higher",
        quantity=Quantity(value=math.fsum(samples) / 120, unit="", how="mean over 120 queries", samples=tuple(samples)),
        baselines={"random": 0.012, "word overlap": 0.43},
        data=DATA,
    )
    rest = {"scores": (score,), "costs": costs, "started": "2026-01-01T00:00:00", "seconds": 3.0} | rest
    slots = {
        "embedding": 46_900_000,
        "projection": 14_200_000,
        "feedforward": 28_400_000,
        "attention": 0,
        "memory": 0,
        "other": 1_400_000,
    }
    shrink = (size - 1_400_000) / 89_500_000
    rest.setdefault("bytes_per_slot", {slot: int(n * shrink) if slot != "other" else n for slot, n in slots.items()})
    rest.setdefault(
        "environment", {"processor": "a processor", "threads": 2, "packages": {"torch": "2.13.0", "taut": "0.1.0"}}
    )
    return trial.record("done", **rest)


def quickstart() -> list[Record]:
    """A whole study: sixteen recipes, one of which fails as it should."""
    low_bit = {"method": "low_bit", "bits": 8}
    recipes: list[tuple[str, dict[str, Any], float, float, float]] = [
        ("dense", DENSE, 0.0, 90.9, 1.0),
        ("identity", IDENTITY, 0.0, 90.9, 1.002),
        ("table int8", {"embedding": low_bit}, 0.0003, 56.0, 0.999),
        ("table int4 per row", {"embedding": low_bit | {"bits": 4}}, 0.012, 50.2, 0.998),
        ("table int4 group 64", {"embedding": low_bit | {"bits": 4, "group": 64}}, 0.005, 50.9, 1.0),
    ]
    for keep, loss, cut in ((0.75, 0.02, 11.7), (0.5, 0.06, 23.4), (0.25, 0.17, 35.2)):
        recipes.append(
            (f"table low-rank {keep}", {"embedding": {"method": "low_rank", "keep": keep}}, loss, 90.9 - cut, 1.01)
        )
    for keep, loss, time in ((0.75, 0.05, 1.08), (0.5, 0.2, 0.86), (0.32, 0.33, 0.71)):
        recipe = {"feedforward": {"method": "low_rank", "keep": keep}}
        recipes.append((f"feed-forward low-rank {keep}", recipe, loss, 90.9 - 28.4 * (1 - keep), time))
    recipes += [
        ("linears int8", {"projection": low_bit, "feedforward": low_bit}, 0.003, 59.1, 0.55),
        ("local attention", {"attention": {"method": "local_global", "window": 64}}, 0.004, 90.9, 1.21),
        ("all int8", dict.fromkeys(("embedding", "projection", "feedforward"), low_bit), 0.004, 24.0, 0.56),
    ]
    records = []
    for number, (name, recipe, loss, megabytes, time) in enumerate(recipes):
        started = f"2026-01-01T00:00:{number:02d}"
        records.append(record(spec(name, recipe), loss, megabytes * 1e6, time, started=started))
    fails = spec("cache on an encoder", {"memory": {"method": "window_sink"}}, expect="failed")
    records.append(
        fails.record("failed", reason="memory: no site: an encoder keeps no cache", started="2026-01-01T00:01:00")
    )
    return records
