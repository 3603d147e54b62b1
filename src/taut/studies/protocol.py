"""Compares variants with their baseline, and decides which word describes each difference.

The baseline is the dense trial of the same model and seed. Scores are compared item by item, latencies by the
interleaved ratio that the trial measured. The difference that ``identity`` shows is the error bar. A difference is
"within noise" if it lies within the error bar, or if its own interval includes equality. If several variants claim to
be better, they share one error rate (Holm). A loss is reported as soon as its own interval shows it.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from taut.core.record import Quantity, Record, Score
from taut.core.table import clip
from taut.studies.statistics import (
    CONFIDENCE,
    Contrast,
    difference,
    difference_of_exponentials,
    holm,
    paired_bootstrap,
    sign_flip_test,
    student_interval,
)

NOISE = "within noise"
UNKNOWN = "no interval"


@dataclass(frozen=True)
class Column:
    """How to read a cost.

    ``words`` are those for less and for more of it; without words, only the ratio is shown. ``ratio`` names the cost
    that holds the interleaved ratio. ``alone``: each trial measured it alone, so it is not compared across trials.
    """

    label: str
    help: str
    words: tuple[str, str] | None = None
    ratio: str | None = None
    better: Literal["higher", "lower"] = "lower"
    alone: bool = False


COSTS = {
    "stored_bytes": Column("size", "bytes of all distinct tensors, ties counted once", ("smaller", "larger")),
    "file_bytes": Column("file", "bytes of the saved weight files", ("smaller", "larger")),
    "resident_bytes": Column("resident", "bytes of the tensors once loaded", ("smaller", "larger")),
    "logical_parameters": Column("parameters", "numbers the model stands for", ("fewer", "more")),
    "peak_bytes": Column("peak memory", "most memory of a fresh process that loads and runs the model"),
    "flops_per_token": Column("FLOPs/token", "a multiply-add counts as two", ("fewer", "more")),
    "cache_bytes_per_token": Column(
        "KV bytes/token",
        "bytes of the cache after the prompt that latency is timed on, per token of it",
        ("smaller", "larger"),
    ),
    "latency_prefill": Column("prefill", "one forward pass", ("faster", "slower"), "latency_prefill_ratio"),
    "latency_decode": Column("decode", "one new token", ("faster", "slower"), "latency_decode_ratio"),
    "throughput": Column("throughput", "tokens per second of the forward pass", better="higher", alone=True),
    "compress_seconds": Column("compression", "seconds to open, calibrate, fit and heal", alone=True),
    "energy_joules": Column("energy", "joules of one forward pass", alone=True),
}
RATIOS = {column.ratio: name for name, column in COSTS.items() if column.ratio}


@dataclass(frozen=True)
class Source:
    """Where a value comes from: a quantity of one record, and its score if it is one."""

    record: Record
    quantity: Quantity
    score: Score | None = None


@dataclass(frozen=True)
class Gap:
    """A variant against its baseline: a ``difference`` or a ``ratio`` (variant over dense), its interval, and a word.

    ``good``: whether the word is in favour of the variant; None if it takes no side.
    """

    kind: Literal["difference", "ratio"]
    value: float
    how: str
    low: float | None = None
    high: float | None = None
    p: float | None = None
    word: str = ""
    good: bool | None = None

    def __repr__(self) -> str:
        bounds = "" if self.low is None else f" ({self.low:.4g} to {self.high:.4g})"
        return clip(f"Gap({self.kind} {self.value:.4g}{bounds}, {self.word or 'no verdict'})")

    def to_dict(self) -> dict[str, Any]:
        content = {name: getattr(self, name) for name in ("kind", "value", "low", "high", "p", "how")}
        return content | {"verdict": self.word or None}


@dataclass(frozen=True)
class Cell:
    """One value of the table: the mean over seeds. ``value`` None means missing, and ``how`` says why."""

    value: float | None
    unit: str
    how: str
    better: Literal["higher", "lower"]
    sources: tuple[Source, ...]
    low: float | None = None
    high: float | None = None
    gap: Gap | None = None

    def __repr__(self) -> str:
        value = "n/a" if self.value is None else f"{self.value:.4g} {self.unit}".strip()
        return clip(f"Cell({value}, {self.gap})" if self.gap else f"Cell({value})")

    def to_dict(self) -> dict[str, Any]:
        content = {name: getattr(self, name) for name in ("value", "unit", "low", "high", "how")}
        return content | {"against_dense": self.gap.to_dict() if self.gap else None}


@dataclass(frozen=True)
class Row:
    """One model with one recipe, over all its seeds. ``records`` are those shown, ``failures`` the failed ones."""

    model: str
    recipe_name: str
    recipe: dict[str, Any]
    role: Literal["dense", "identity", "variant"]
    records: tuple[Record, ...]
    failures: tuple[Record, ...] = ()
    superseded: int = 0
    scores: dict[str, Cell] = field(default_factory=dict)
    costs: dict[str, Cell] = field(default_factory=dict)
    bytes_per_slot: dict[str, int] = field(default_factory=dict)
    heal: int = 0

    @property
    def name(self) -> str:
        return f"{self.model} · {self.recipe_name}"

    @property
    def status(self) -> Literal["done", "failed"]:
        return "done" if self.records else "failed"

    @property
    def reason(self) -> str:
        return "; ".join(dict.fromkeys(record.reason or "no reason was given" for record in self.failures))

    def __repr__(self) -> str:
        amounts = f"{len(self.scores)} scores, {len(self.costs)} costs" if self.records else self.reason
        return clip(f"Row({self.name}: {self.status}, {amounts})")

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, every number unrounded."""
        return {
            "model": self.model,
            "recipe": self.recipe_name,
            "role": self.role,
            "status": self.status,
            "reason": self.reason or None,
            "records": [record.id for record in (*self.records, *self.failures)],
            "scores": {key: cell.to_dict() for key, cell in self.scores.items()},
            "costs": {name: cell.to_dict() for name, cell in self.costs.items() if name not in RATIOS},
            "bytes_per_slot": self.bytes_per_slot,
            "heal": self.heal,
        }


def summary(records: Iterable[Record]) -> list[Row]:
    """Make one row for each model, recipe and number of healing steps, compared with its dense model.

    Rows are in the order in which the trials began. If one model, recipe and seed has several records (another length,
    more tasks), the latest is used.
    """
    latest: dict[tuple[tuple[str, str, int], int], Record] = {}
    older: dict[tuple[str, str, int], int] = defaultdict(int)
    for record in sorted(records, key=lambda record: (record.started, record.id)):
        key = (record.model, record.recipe_digest, record.heal)
        older[key] += (key, record.seed) in latest
        latest[key, record.seed] = record
    groups: dict[tuple[str, str, int], list[Record]] = defaultdict(list)
    for (key, _), record in latest.items():
        groups[key].append(record)
    rows = [_row(group, older[key]) for key, group in groups.items()]
    return [row for model in dict.fromkeys(row.model for row in rows) for row in _compared(model, rows)]


def score_keys(rows: Iterable[Row]) -> list[str]:
    """The keys ``task metric`` of all rows, in the order of the records."""
    return list(dict.fromkeys(key for row in rows for key in row.scores))


def cost_keys(rows: Iterable[Row]) -> list[str]:
    """The costs for which at least one row has a value, in the order of ``COSTS``; unknown names come last."""
    seen = {name for row in rows for name, cell in row.costs.items() if cell.value is not None}
    return [name for name in COSTS if name in seen] + sorted(seen - set(COSTS))


def role_of(recipe: dict[str, Any]) -> Literal["dense", "identity", "variant"]:
    lines = [line for slot in recipe.values() for line in (slot if isinstance(slot, list) else [slot])]
    if not lines:
        return "dense"
    return "identity" if all(line["method"] == "identity" for line in lines) else "variant"


def _row(group: list[Record], superseded: int) -> Row:
    done = [record for record in group if record.status == "done"]
    scores: dict[str, list[Source]] = defaultdict(list)
    costs: dict[str, list[Source]] = defaultdict(list)
    for record in done:
        for score in record.scores:
            scores[f"{score.task} {score.metric}"].append(Source(record, score.quantity, score))
        for name, quantity in record.costs.items():
            costs[name].append(Source(record, quantity))
    return Row(
        model=group[-1].model,
        recipe_name=group[-1].recipe_name,
        recipe=group[-1].recipe,
        role=role_of(group[-1].recipe),
        records=tuple(done),
        failures=tuple(record for record in group if record.status == "failed"),
        superseded=superseded,
        scores={key: _cell(sources, sources[0].score.better) for key, sources in scores.items()},
        costs={key: _cell(sources, COSTS[key].better if key in COSTS else "lower") for key, sources in costs.items()},
        bytes_per_slot=done[-1].bytes_per_slot if done else {},
        heal=group[-1].heal,
    )


def _cell(sources: list[Source], better: Literal["higher", "lower"]) -> Cell:
    first = sources[0].quantity
    values = [source.quantity.value for source in sources if source.quantity.value is not None]
    how = "; ".join(dict.fromkeys(source.quantity.how for source in sources))
    cell = Cell(None, first.unit, how, better, tuple(sources))
    if not values:
        return cell
    if len(values) == 1:
        only = next(source.quantity for source in sources if source.quantity.value is not None)
        return replace(cell, value=only.value, low=only.low, high=only.high)
    interval = student_interval(values)
    how = f"mean over {len(values)} seeds, Student interval; {how}"
    return replace(cell, value=interval.value, low=interval.low, high=interval.high, how=how)


def _compared(model: str, rows: Sequence[Row]) -> list[Row]:
    """The rows of one model, with the gaps to its dense row filled in. Without a dense row there are no gaps."""
    group = [row for row in rows if row.model == model]
    dense = next((row for row in group if row.role == "dense" and row.records), None)
    control = next((row for row in group if row.role == "identity" and row.records), None)
    if dense is None:
        return group
    gaps: dict[tuple[int, str], Gap] = {}
    for index, row in enumerate(group):
        for key, cell in row.scores.items():
            if row is not dense and (gap := _score_gap(cell, dense.scores.get(key))):
                gaps[index, key] = gap
    for key in score_keys(group):
        bar = gaps.get((group.index(control), key)) if control else None
        tested = [at for at in gaps if at[1] == key and gaps[at].p is not None and group[at[0]] is not control]
        for at, p in zip(tested, holm([gaps[at].p for at in tested]), strict=True):
            gaps[at] = replace(gaps[at], p=p)
        for at in [at for at in gaps if at[1] == key]:
            gaps[at] = _score_word(gaps[at], bar, group[at[0]].scores[key].better)
    return [
        replace(
            row,
            scores={key: replace(cell, gap=gaps.get((index, key))) for key, cell in row.scores.items()},
            costs={key: replace(cell, gap=_cost_gap(key, row, dense, control)) for key, cell in row.costs.items()},
        )
        for index, row in enumerate(group)
    ]


def _score_gap(variant: Cell, baseline: Cell | None) -> Gap | None:
    """The difference of two scores over the seeds that both have; None if nothing can be compared."""
    of_seed = {source.record.seed: source for source in (baseline.sources if baseline else ())}
    pairs = [
        (source.quantity, of_seed[source.record.seed].quantity)
        for source in variant.sources
        if source.record.seed in of_seed and source.score.data == of_seed[source.record.seed].score.data
    ]
    pairs = [(ours, dense) for ours, dense in pairs if ours.value is not None and dense.value is not None]
    if not pairs:
        return None
    values = [ours.value - dense.value for ours, dense in pairs]
    gap = Gap("difference", fmean(values), "difference of the values; the scores keep no items to compare one by one")
    contrasts = {_contrast(quantity) for pair in pairs for quantity in pair}
    counts = {len(quantity.samples) for pair in pairs for quantity in pair}
    if len(contrasts) == len(counts) == 1 and None not in contrasts and min(counts) >= 2:
        sides = [
            [fmean(item) for item in zip(*(q.samples for q in side), strict=True)] for side in zip(*pairs, strict=True)
        ]
        interval = paired_bootstrap(*sides, contrasts.pop())
        how = f"{counts.pop()} items compared one by one: BCa bootstrap, {CONFIDENCE:.0%}; p by flipping signs, Holm"
        gap = Gap("difference", gap.value, how, interval.low, interval.high, sign_flip_test(*sides))
    if len(values) > 1:
        seeds = student_interval(values)
        low = seeds.low if gap.low is None else min(seeds.low, gap.low)
        high = seeds.high if gap.high is None else max(seeds.high, gap.high)
        gap = replace(gap, low=low, high=high, how=f"{gap.how}; widened by Student's interval over {len(values)} seeds")
    return gap


def _contrast(quantity: Quantity) -> Contrast | None:
    """The contrast that fits how the items give the value: as their mean, or as its exponential for perplexities."""
    if not quantity.samples or quantity.value is None:
        return None
    mean = fmean(quantity.samples)
    if math.isclose(mean, quantity.value, rel_tol=1e-6, abs_tol=1e-9):
        return difference
    # A float holds exp(700), but not much more.
    if mean < 700 and math.isclose(math.exp(mean), quantity.value, rel_tol=1e-6):
        return difference_of_exponentials
    return None


def _score_word(gap: Gap, bar: Gap | None, better: str) -> Gap:
    noise = max(abs(end) for end in (bar.value, bar.low or 0.0, bar.high or 0.0)) if bar else 0.0
    if gap.value == 0 and not gap.low and not gap.high:
        return replace(gap, word="same")
    if abs(gap.value) <= noise:
        return replace(gap, word=NOISE)
    if gap.low is None or gap.high is None:
        return replace(gap, word=UNKNOWN)
    good = (gap.value > 0) == (better == "higher")
    # A loss is reported as soon as its own interval shows it; a gain must also survive the correction.
    if gap.low <= 0 <= gap.high or (good and gap.p is not None and gap.p > 1 - CONFIDENCE):
        return replace(gap, word=NOISE)
    return replace(gap, word="better" if good else "worse", good=good)


def _cost_gap(name: str, row: Row, dense: Row, control: Row | None) -> Gap | None:
    """The ratio of a cost to the dense model's: interleaved for latencies, else the ratio of the two values."""
    column = COSTS.get(name)
    if row is dense or column is None or column.alone:
        return None
    if column.ratio:
        timed = row.costs.get(column.ratio)
        if timed is None or timed.value is None:
            return None
        bar = control.costs.get(column.ratio) if control else None
        return _ratio_word(Gap("ratio", timed.value, timed.how, timed.low, timed.high), bar, column.words)
    value, reference = row.costs[name].value, dense.costs[name].value if name in dense.costs else None
    if value is None or not reference:
        return None
    gap = Gap("ratio", value / reference, "ratio to the dense model's value")
    if column.words is None:
        return gap
    if value == reference:
        return replace(gap, word="same")
    return replace(gap, word=column.words[value > reference], good=value < reference)


def _ratio_word(gap: Gap, bar: Cell | None, words: tuple[str, str]) -> Gap:
    if gap.low is None or gap.high is None:
        return replace(gap, word=UNKNOWN)
    ends = [1.0] + [end for end in ((bar.low, bar.high) if bar else ()) if end is not None]
    if gap.high < min(ends):
        return replace(gap, word=words[0], good=True)
    if gap.low > max(ends):
        return replace(gap, word=words[1], good=False)
    return replace(gap, word=NOISE)
