"""Shows the summary as a table in the terminal."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from taut.reporting import words
from taut.studies.protocol import COSTS, Cell, Row, cost_keys, score_keys

STYLES = {"good": "green", "bad": "red", "noise": "dim", "unknown": "yellow", "none": ""}
TERMINAL_COSTS = ("stored_bytes", "latency_prefill", "latency_decode", "peak_bytes", "cache_bytes_per_token")


def terminal(rows: Sequence[Row], model: str) -> Table:
    """The rows of one model. Colours and words mark good and bad; failures come last, with their reasons."""
    of_model = [row for row in rows if row.model == model]
    table = Table(title=Text(model), title_justify="left", title_style="bold", header_style="dim", pad_edge=False)
    table.add_column("recipe")
    scores, costs = score_keys(of_model), [name for name in cost_keys(of_model) if name in TERMINAL_COSTS]
    for key in scores:
        table.add_column(Text(key), justify="right")
    for name in costs:
        table.add_column(words.label(name), justify="right")
    for row in (row for row in of_model if row.records):
        cells = [_text(row.scores.get(key), None) for key in scores]
        cells += [_text(row.costs.get(name), COSTS[name].words) for name in costs]
        table.add_row(Text(row.recipe_name, style="bold" if row.role == "dense" else ""), *cells)
    for row in (row for row in of_model if row.failures):
        # The column is too narrow for the reason, so it goes below the table.
        table.add_row(Text(row.recipe_name, style="red"), Text("failed", style="red"))
    reasons = [f"{row.recipe_name} failed: {row.reason}" for row in of_model if row.failures]
    if reasons:
        table.caption, table.caption_justify = Text("\n".join(reasons)), "left"
    return table


def _text(cell: Cell | None, names: tuple[str, str] | None) -> Text:
    if cell is None or cell.value is None:
        return Text("n/a", style="dim")
    text = Text(words.value(cell))
    if cell.gap is not None:
        text.append("\n" + words.gap(cell.gap, names), STYLES[words.verdict(cell.gap)])
    return text
