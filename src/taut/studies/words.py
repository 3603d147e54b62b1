"""Formats numbers and recipes for people."""

from typing import Any

from taut.core.numbers import scaled
from taut.studies.protocol import COSTS, NOISE, UNKNOWN, Cell, Gap, Row

SLOT_LABELS = {
    "embedding": "embedding",
    "projection": "projection",
    "attention": "attention",
    "feedforward": "feed-forward",
    "memory": "memory",
}


def value(cell: Cell) -> str:
    """A cell's value with its unit, or a score without one; ``n/a`` if it could not be measured."""
    if cell.value is None:
        return "n/a"
    return score(cell.value) if cell.sources[0].score is not None else quantity(cell.value, cell.unit)


def quantity(number: float, unit: str) -> str:
    """``number`` in a readable multiple of ``unit``; bytes in powers of 1000, as for storage devices."""
    if unit in ("B", "bytes", "bytes/token"):
        return scaled(number, "B")
    if unit in ("s", "seconds"):
        factor, name = (1.0, "s") if number >= 1 else (1e-3, "ms") if number >= 1e-3 else (1e-6, "µs")
        return f"{number / factor:.3g} {name}"
    # The heading of the column already names these units.
    unit = "" if unit in ("parameters", "FLOPs/token") else unit
    if abs(number) >= 1000:
        return f"{scaled(number)} {unit}".strip()
    return f"{number:.4g} {unit}".strip()


def score(number: float) -> str:
    """A score, with four digits after the point if it is below 10, because differences of .001 matter."""
    return f"{number:.4f}" if abs(number) < 10 else f"{number:.5g}"


def signed(number: float) -> str:
    """A difference with its sign, and a true minus sign."""
    return f"{'+' if number > 0 else '−' if number < 0 else '±'}{score(abs(number))}"


def gap(comparison: Gap | None, names: tuple[str, str] | None = None) -> str:
    """A difference or a ratio in words, with its verdict: ``+0.0012 within noise``, ``39% smaller``, ``1.32× faster``.

    ``names`` are the words of the column for less and for more. A ratio near 1 is given in percent.
    """
    if comparison is None:
        return ""
    if comparison.kind == "difference":
        return f"{signed(comparison.value)} {comparison.word}".strip()
    if names is None or comparison.word not in names:
        return comparison.word if comparison.word == "same" else f"{comparison.value:.2f}× {comparison.word}".strip()
    if names[0] == "faster":
        return f"{1 / comparison.value if comparison.word == 'faster' else comparison.value:.2f}× {comparison.word}"
    if comparison.value <= 0.5 or comparison.value >= 2:
        return f"{1 / comparison.value if 0 < comparison.value < 1 else comparison.value:.3g}× {comparison.word}"
    share = abs(comparison.value - 1)
    return f"{100 * share:.2g}% {comparison.word}"


def interval(comparison: Gap | Cell | None) -> str:
    """``[low, high]``, or an empty string."""
    if comparison is None or comparison.low is None or comparison.high is None:
        return ""
    if isinstance(comparison, Gap) and comparison.kind == "difference":
        return f"[{signed(comparison.low)}, {signed(comparison.high)}]"
    if isinstance(comparison, Gap):
        return f"[{comparison.low:.2f}, {comparison.high:.2f}]"
    return f"[{quantity(comparison.low, comparison.unit)}, {quantity(comparison.high, comparison.unit)}]"


def verdict(comparison: Gap | None) -> str:
    """The class of a gap, which sets its colour: good, bad, noise, unknown or none."""
    if comparison is None or not comparison.word:
        return "none"
    if comparison.word == UNKNOWN:
        return "unknown"
    if comparison.word in (NOISE, "same") or comparison.good is None:
        return "noise"
    return "good" if comparison.good else "bad"


def label(cost: str) -> str:
    return COSTS[cost].label if cost in COSTS else cost.replace("_", " ")


def slots_of(row: Row) -> list[str]:
    """The slots that a recipe changes."""
    lines = {slot: entry if isinstance(entry, list) else [entry] for slot, entry in row.recipe.items()}
    return [slot for slot in SLOT_LABELS if any(line["method"] != "identity" for line in lines.get(slot, ()))]


def family(row: Row) -> str:
    """The family of a recipe, which sets its colour: dense, identity, one slot, linear maps, or a combination."""
    slots = slots_of(row)
    if row.role != "variant":
        return row.role
    if set(slots) <= {"projection", "feedforward"}:
        return "linear maps"
    return slots[0] if len(slots) == 1 else "combination"


def method(row: Row, slot: str) -> str:
    """The method or methods that a recipe uses in a slot."""
    lines = row.recipe[slot] if isinstance(row.recipe[slot], list) else [row.recipe[slot]]
    return " + ".join(dict.fromkeys(str(line["method"]) for line in lines))


def recipe_line(recipe: dict[str, Any]) -> str:
    """A recipe on one line: ``embedding: low_bit bits 8 · memory: window_sink``."""
    parts = []
    for slot, entry in recipe.items():
        for line in entry if isinstance(entry, list) else [entry]:
            parts.append(f"{SLOT_LABELS.get(slot, slot)}: {_line(line)}")
    return " · ".join(parts) or "nothing changed"


def _line(line: dict[str, Any]) -> str:
    words = [str(line["method"])]
    words += [f"{key} {setting}" for key, setting in line.items() if key not in ("method", "store")]
    if "store" in line:
        words.append(f"stored as {_line(line['store'])}")
    return " ".join(words)
