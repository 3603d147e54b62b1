"""The comparison of a study: its rows, shown as tables, and as tidy rows for other programs."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from taut.core.table import LINES, Mark, Table, data_frame
from taut.studies import words
from taut.studies.ledger import Ledger
from taut.studies.protocol import COSTS, RATIOS, Cell, Row, cost_keys, score_keys, summary

SHOWN_COSTS = ("stored_bytes", "latency_prefill", "latency_decode", "peak_bytes", "cache_bytes_per_token")
"""The costs that fit in a table; the report and the tidy rows have all."""
COLUMNS = (
    *("model", "recipe", "heal", "seeds", "status", "reason", "kind", "quantity", "value", "low", "high", "unit"),
    *("gap_kind", "gap_value", "gap_low", "gap_high", "verdict"),
)


class Comparison(list[Row]):
    """The rows of a comparison, one for each model and recipe: a list that shows itself as a table for each model."""

    @classmethod
    def load(cls, ledger: str | Path) -> Self:
        """The comparison of all records in the folder ``ledger``. Raises TautError if it is a file."""
        return cls(summary(Ledger(ledger).records()))

    def tables(self) -> list[Table]:
        """A table for each model. Words and marks say what is good and bad; failures come last, with their reasons."""
        return [
            _table(model, [row for row in self if row.model == model])
            for model in dict.fromkeys(row.model for row in self)
        ]

    def tidy(self) -> list[dict[str, Any]]:
        """A row for each score and cost of each recipe, every number unrounded: the columns ``COLUMNS``.

        ``value`` is the mean over the ``seeds``; ``gap_kind`` is ``difference`` or ``ratio``, against the dense model.
        A recipe whose every trial failed has one row, with the reason and no value.
        """
        lines: list[dict[str, Any]] = []
        for row in self:
            shared = {"model": row.model, "recipe": row.recipe_name, "heal": row.heal, "seeds": len(row.records)}
            shared |= {"status": row.status, "reason": row.reason or None}
            costs = {name: cell for name, cell in row.costs.items() if name not in RATIOS}
            cells = [_tidy("score", key, cell) for key, cell in row.scores.items()]
            cells += [_tidy("cost", name, cell) for name, cell in costs.items()]
            lines += [dict.fromkeys(COLUMNS) | shared | cell for cell in cells or [{}]]
        return lines

    def csv(self) -> str:
        """The tidy rows as the text of a CSV file with one line of names. Missing values are empty."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.tidy())
        return text.getvalue()

    def to_dict(self) -> dict[str, Any]:
        """The rows as one dictionary, ready for JSON, every number unrounded."""
        return {"rows": [row.to_dict() for row in self]}

    def to_pandas(self) -> Any:
        """The tidy rows as a pandas DataFrame. Raises TautError if pandas is not installed."""
        return data_frame(self.tidy(), COLUMNS)

    def text(self, lines: int = LINES) -> str:
        """The table of the first model in at most ``lines`` lines, and how many more models there are."""
        first, *others = self.tables() or [Table(("recipe",), ())]
        more = [f"… {len(others)} more model{'s' * (len(others) > 1)}"] if others else []
        return "\n".join([first.text(lines - len(more)), *more])

    def __repr__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


def _table(model: str, rows: list[Row]) -> Table:
    scores, costs = score_keys(rows), [name for name in cost_keys(rows) if name in SHOWN_COSTS]
    done, failed = ([row for row in rows if row.records], [row for row in rows if row.failures])
    lines: list[list[str]] = []
    marks: dict[tuple[int, int], Mark] = {}
    for row in done:
        cells = [(row.scores.get(key), None) for key in scores]
        cells += [(row.costs.get(name), COSTS[name].words) for name in costs]
        for column, (cell, _) in enumerate(cells, 1):
            marks |= {(len(lines), column): mark for mark in _marks(cell)}
        if row.role == "dense":
            marks[len(lines), 0] = "strong"
        lines.append([row.recipe_name, *(_text(*cell) for cell in cells)])
    for row in failed:
        # A column is too narrow for the reason, so it goes below the table.
        marks |= {(len(lines), column): "bad" for column in (0, 1)}
        lines.append([row.recipe_name, "failed", *[""] * (len(scores) + len(costs) - 1)])
    # Where every trial failed, there is no number to head a column.
    names = ["recipe", *(scores + [words.label(name) for name in costs] or ["result"])]
    reasons = [f"{row.recipe_name} failed: {row.reason}" for row in failed]
    return Table(names, lines, title=model, notes=reasons, marks=marks)


def _text(cell: Cell | None, names: tuple[str, str] | None) -> str:
    if cell is None or cell.value is None:
        return "n/a"
    return words.value(cell) + (f"\n{words.gap(cell.gap, names)}" if cell.gap is not None else "")


def _marks(cell: Cell | None) -> Iterable[Mark]:
    """The mark of a cell's last line, if it has one."""
    if cell is None or cell.value is None:
        return ["noise"]
    verdict = words.verdict(cell.gap)
    return [] if verdict == "none" else [verdict]


def _tidy(kind: str, name: str, cell: Cell) -> dict[str, Any]:
    content = {"kind": kind, "quantity": name}
    content |= {key: getattr(cell, key) for key in ("value", "low", "high", "unit")}
    if cell.gap is not None:
        gap = cell.gap
        content |= {"gap_kind": gap.kind, "gap_value": gap.value, "gap_low": gap.low, "gap_high": gap.high}
        content |= {"verdict": gap.word or None}
    return content
