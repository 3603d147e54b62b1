"""The main findings of a report. Every statement is supported by an interval."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from taut.studies import words
from taut.studies.protocol import COSTS, NOISE, Cell, Row, score_keys


@dataclass(frozen=True)
class Card:
    """A finding: its label, the figure, the recipe that it belongs to, and details."""

    label: str
    figure: str
    recipe: str
    text: str
    model: str


def highlights(rows: Sequence[Row]) -> list[Card]:
    """The findings for one model, by its first score; bad ones as well as good ones."""
    variants = [row for row in rows if row.role == "variant" and row.records]
    keys = score_keys(rows)
    if not variants or not keys:
        return []
    key = keys[0]
    unharmed = [row for row in variants if _word(row.scores.get(key)) in ("same", NOISE, "better")]
    cards = [*_smallest(unharmed, key)]
    for cost in ("latency_prefill", "latency_decode"):
        cards += [*_fastest(unharmed, key, cost), *_slower(variants, cost)]
    return [*cards, _worse(variants, key)]


def _smallest(rows: Sequence[Row], key: str) -> Iterator[Card]:
    smaller = [row for row in rows if _word(row.costs.get("stored_bytes")) == "smaller"]
    if smaller:
        row = min(smaller, key=lambda row: row.costs["stored_bytes"].value)
        size = row.costs["stored_bytes"]
        text = f"{words.value(size)}; {_change(row, key)}"
        figure = words.gap(size.gap, COSTS["stored_bytes"].words)
        yield Card("smallest without a visible loss", figure, row.recipe_name, text, row.model)


def _fastest(rows: Sequence[Row], key: str, cost: str) -> Iterator[Card]:
    faster = [row for row in rows if _word(row.costs.get(cost)) == "faster"]
    if faster:
        row = min(faster, key=lambda row: row.costs[cost].gap.value)
        gap = row.costs[cost].gap
        text = f"time ratio {gap.value:.2f} {words.interval(gap)}; {_change(row, key)}"
        label = f"fastest {words.label(cost)} without a visible loss"
        yield Card(label, words.gap(gap, COSTS[cost].words), row.recipe_name, text, row.model)


def _slower(rows: Sequence[Row], cost: str) -> Iterator[Card]:
    timed = [row for row in rows if cost in row.costs and row.costs[cost].gap is not None]
    slower = [row for row in timed if row.costs[cost].gap.word == "slower"]
    figure = f"{len(slower)} of {len(timed)}"
    if slower:
        worst = max(slower, key=lambda row: row.costs[cost].gap.value)
        text = f"{words.label(cost)}; the slowest is {words.gap(worst.costs[cost].gap, COSTS[cost].words)}"
        yield Card("slower than dense", figure, worst.recipe_name, text, worst.model)
    elif timed:
        yield Card("slower than dense", figure, "none", words.label(cost), timed[0].model)


def _worse(rows: Sequence[Row], key: str) -> Card:
    lost = [row for row in rows if _word(row.scores.get(key)) == "worse"]
    figure = f"{len(lost)} of {len(rows)}"
    if not lost:
        return Card("measurably worse", figure, "none", key, rows[0].model)
    worst = max(lost, key=lambda row: abs(row.scores[key].gap.value))
    gap = worst.scores[key].gap
    text = f"{key}; the worst: {words.signed(gap.value)} {words.interval(gap)}"
    return Card("measurably worse", figure, worst.recipe_name, text, worst.model)


def _change(row: Row, key: str) -> str:
    gap = row.scores[key].gap
    return f"{key} {words.gap(gap)} {words.interval(gap)}".strip()


def _word(cell: Cell | None) -> str:
    return cell.gap.word if cell is not None and cell.gap is not None else ""
