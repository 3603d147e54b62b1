"""Draws tables in the terminal."""

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


def terminal(table: Table, *, wide: str = "", ruled: bool = False) -> RichTable:
    """The table without its notes. With ``wide``, only the column of that name wraps in a narrow terminal.

    ``ruled`` is for cells of two lines: with a rule below the names, and numbers to the right.
    """
    drawn = RichTable(box=box.HEAVY_HEAD if ruled else None, pad_edge=False, title_justify="left", title_style="bold")
    drawn.title = Text(table.title) if table.title else None
    for column, name in enumerate(table.names):
        justify = "right" if ruled and column else "left"
        drawn.add_column(Text(name), overflow="fold", no_wrap=bool(wide) and name != wide, justify=justify)
    for index, row in enumerate(table.rows):
        drawn.add_row(*(_text(cell, table.marks.get((index, column))) for column, cell in enumerate(row)))
    if table.total:
        drawn.add_row(*map(Text, table.total), style="bold")
    return drawn


def _text(cell: str, mark: Mark | None) -> Text:
    *above, last = cell.split("\n")
    return Text("\n").join([*map(Text, above), Text(last, style=STYLES[mark])])
