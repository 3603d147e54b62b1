"""Tables of text: made once from a result, then drawn as plain text, as HTML, or by the command line."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any, Literal

from taut.core.errors import TautError

LINES, WIDTH = 9, 99
"""The most that a plain text takes, so that a console stays readable."""
WIDEST_CELL = 40
Mark = Literal["good", "bad", "noise", "unknown", "strong"]
# Colours with enough contrast on a white page and on a black one.
STYLES: dict[str, str] = {
    "good": "color: #198754",
    "bad": "color: #dc3545",
    "noise": "opacity: 0.7",
    "unknown": "color: #a67c00",
    "strong": "font-weight: bold",
}


@dataclass(frozen=True)
class Table:
    """Columns ``names``, ``rows`` of cells, and ``total``, a last row that sums them up.

    A cell may have a second line. ``marks`` sets the style of a cell's last line, by row and column. ``notes`` are
    lines below the table.
    """

    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] = ()
    title: str = ""
    notes: Sequence[str] = ()
    marks: Mapping[tuple[int, int], Mark] = field(default_factory=dict)

    def text(self, lines: int = LINES, width: int = WIDTH) -> str:
        """At most ``lines`` lines of at most ``width`` characters. The last line says what is left out."""
        room = lines - 1 - bool(self.title) - bool(self.total)
        foot = [self.total] if self.total else []
        rows = [[clip(cell, WIDEST_CELL) for cell in row] for row in (self.names, *self.rows, *foot)]
        columns = _columns_within(rows, width)
        if len(self.rows) + len(self.notes) > room or columns < len(self.names):
            room -= 1
        shown = min(len(self.rows), room)
        notes = self.notes[: room - shown]
        drawn = [row[:columns] for row in (*rows[: 1 + shown], *rows[1 + len(self.rows) :])]
        widths = [max(len(cell) for cell in column) for column in zip(*drawn, strict=True)]
        aligned = ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)) for row in drawn]
        left_out = {
            "row": len(self.rows) - shown,
            "column": len(self.names) - columns,
            "line": len(self.notes) - len(notes),
        }
        more = ", ".join(f"{count} more {word}{'s' * (count > 1)}" for word, count in left_out.items() if count)
        parts = [*([self.title] if self.title else []), *aligned, *notes, *([f"… {more}"] if more else [])]
        return "\n".join(clip(part.rstrip(), width) for part in parts)

    def html(self) -> str:
        """One HTML table without scripts and without colours of its own for page and text; all content is escaped."""
        caption = f"<caption {_style('text-align: left')}>{escape(self.title)}</caption>" if self.title else ""
        head = "".join(f"<th {_style('text-align: left')}>{escape(name)}</th>" for name in self.names)
        body = "".join(
            f"<tr>{''.join(_cell(cell, self.marks.get((index, column))) for column, cell in enumerate(row))}</tr>"
            for index, row in enumerate(self.rows)
        )
        foot = "".join(_cell(cell, "strong") for cell in self.total)
        foot = f"<tfoot><tr>{foot}</tr></tfoot>" if self.total else ""
        notes = f"<div {_style('white-space: pre-wrap')}>{escape(chr(10).join(self.notes))}</div>" if self.notes else ""
        return f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table>{notes}"


def data_frame(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> Any:
    """The rows as a pandas DataFrame, every number unrounded. Raises TautError if pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise TautError("to_pandas: pandas is not installed; install it with: pip install 'taut[notebook]'") from None
    return pandas.DataFrame(list(rows), columns=list(columns))


def clip(text: str, width: int = WIDTH) -> str:
    """``text`` in one line of at most ``width`` characters."""
    text = text.replace("\n", " ")
    return text if len(text) <= width else text[: width - 1] + "…"


def _columns_within(rows: Sequence[Sequence[str]], width: int) -> int:
    """How many of the first columns fit beside each other; at least one."""
    used = columns = 0
    for column in zip(*rows, strict=True):
        used += max(len(cell) for cell in column) + 2 * bool(columns)
        if used > width and columns:
            break
        columns += 1
    return columns


def _cell(text: str, mark: Mark | None) -> str:
    *above, last = (escape(line) for line in text.split("\n"))
    marked = f"<span {_style(STYLES[mark])}>{last}</span>" if mark else last
    return f"<td {_style('text-align: left')}>{'<br>'.join([*above, marked])}</td>"


def _style(declaration: str) -> str:
    return f'style="{declaration}"'
