"""Draws tables in the terminal."""

import re
from collections.abc import Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from taut.core.table import Mark, Table

STYLES: dict[Mark | None, str] = {
    "good": "green",
    "bad": "red",
    "noise": "dim",
    "unknown": "yellow",
    "strong": "bold",
    None: "",
}


TALLEST = 5
"""The most lines of a cell. A table that needs more in its width is drawn as one block for each row."""


def terminal(table: Table, width: int, *, ruled: bool = False) -> RichTable | Text:
    """The table without its notes, in lines of ``width`` characters: no word and no number is broken.

    Long cells continue on further lines. Where that is not enough, each row becomes a block with a line for each
    column, and only a word that is longer than the rest of its line goes beyond ``width``. ``ruled`` is for cells of
    two lines: with a rule below the names, and numbers to the right.
    """
    lines = [table.names, *table.rows, *([table.total] if table.total else [])]
    gaps = 3 * len(table.names) - 1 if ruled else 2 * (len(table.names) - 1)
    widths = _widths(lines, width - gaps)
    if widths is None or any(
        len(_wrapped(cell, size)) > TALLEST for line in lines for cell, size in zip(line, widths, strict=True)
    ):
        return _blocks(table, width)
    drawn = RichTable(box=box.HEAVY_HEAD if ruled else None, pad_edge=False, title_justify="left", title_style="bold")
    drawn.title = Text(table.title) if table.title else None
    for column, (name, size) in enumerate(zip(table.names, widths, strict=True)):
        drawn.add_column(
            Text("\n".join(_wrapped(name, size))), width=size, justify="right" if ruled and column else "left"
        )
    for index, row in enumerate(table.rows):
        cells = enumerate(zip(row, widths, strict=True))
        drawn.add_row(*(_text(cell, size, table.marks.get((index, column))) for column, (cell, size) in cells))
    if table.total:
        drawn.add_row(*(_text(cell, size) for cell, size in zip(table.total, widths, strict=True)), style="bold")
    return drawn


def _widths(lines: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """The widths of the columns, the widest shortened until all fit in ``room``. None if they cannot."""
    columns = [[line for cell in column for line in cell.split("\n")] for column in zip(*lines, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(piece) for line in column for piece in _pieces(line)) for column in columns]
    if sum(least) > room:
        return None
    while sum(widths) > room:
        longer = [column for column in range(len(widths)) if widths[column] > least[column]]
        widths[max(longer, key=widths.__getitem__)] -= 1
    return widths


def _pieces(line: str) -> list[str]:
    """The words of a line. A number stays together with a unit, arrow or sign of one or two letters behind it."""
    return [piece.replace("\0", " ") for piece in re.sub(r"(\d) (?=\S{1,2}(\s|$))", "\\1\0", line).split(" ")]


def _wrapped(cell: str, width: int) -> list[str]:
    """The lines of a cell, each of whole pieces."""
    lines: list[str] = []
    for line in cell.split("\n"):
        lines.append("")
        for number, piece in enumerate(_pieces(line)):
            if number and len(lines[-1]) + 1 + len(piece) <= width:
                lines[-1] += f" {piece}"
            elif number:
                lines.append(piece)
            else:
                lines[-1] = piece
    return lines


def _text(cell: str, width: int, mark: Mark | None = None) -> Text:
    *above, last = cell.split("\n")
    texts = [Text("\n".join(_wrapped(line, width))) for line in above]
    return Text("\n").join([*texts, Text("\n".join(_wrapped(last, width)), style=STYLES[mark])])


def _blocks(table: Table, width: int) -> Text:
    """Each row as its first cell, then a line for each other column that has something to say."""
    names = [name.replace("\n", " ") for name in table.names]
    indent = max(map(len, names[1:]), default=0) + 4
    parts = [Text(table.title, style="bold")] if table.title else []
    for index, row in enumerate([*table.rows, *([table.total] if table.total else [])]):
        parts.append(Text(row[0].replace("\n", " "), style="bold"))
        for column, cell in enumerate(row[1:], 1):
            if cell not in ("", "-"):
                value = _text(cell, width - indent, table.marks.get((index, column)))
                head = Text(f"  {names[column]}".ljust(indent))
                parts.append(head + Text("\n" + " " * indent).join(value.split("\n")))
    return Text("\n").join(parts)
