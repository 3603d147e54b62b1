"""Prints tables and progress for people. Progress goes to stderr, results to stdout."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from taut.core.record import Quantity, Score

OUT = Console(width=None if sys.stdout.isatty() else 120)
ERR = Console(stderr=True)


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr, updated with (done, total). Shows nothing if stderr is not a terminal."""
    with stages(label) as (step,):
        yield step


@contextmanager
def stages(*labels: str) -> Iterator[list[Callable[[int, int], None]]]:
    """Show a bar for each stage of a longer job, as ``progress`` does for one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:

        def step(task: TaskID, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield [partial(step, bar.add_task(escape(label), total=None)) for label in labels]


@contextmanager
def training(label: str) -> Iterator[Callable[[Any], None]]:
    """Show a bar with loss, speed and time left, updated with the moments of a training run.

    Each evaluation adds a line, also if stderr is not a terminal; then there is no bar.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task(escape(label), total=1.0)

        def show(moment: Any) -> None:
            speed = f"{moment.tokens_per_second:,.0f} tokens/s"
            if not moment.evaluation:
                text = f"{label}: step {moment.step:,}, loss {moment.loss:.4f}, {speed}"
                bar.update(task, completed=moment.done, description=escape(text))
            else:
                text = f"step {moment.step:,} ({moment.done:.0%}): held-out loss {moment.loss:.4f}, {speed}"
                bar.console.print(text, highlight=False, markup=False)

        yield show


@contextmanager
def status(label: str) -> Iterator[Callable[[str], None]]:
    """Show a line on stderr that says what is being done."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as line:
        task = line.add_task(escape(label), total=None)
        yield lambda text: line.update(task, description=escape(text))


def methods(rows: list[dict[str, Any]]) -> None:
    table = _table("method", "what it does", "dial", "knobs")
    for row in rows:
        knobs = ", ".join(f"{name}={knob['default']}" for name, knob in row["knobs"].items())
        table.add_row(*(escape(text) for text in (row["id"], row["summary"], row["dial"] or "-", knobs)))
    OUT.print(table)
    OUT.print("sources and costs: docs/methods, or taut methods --json")


def plan(content: dict[str, Any]) -> None:
    """Print one line per slot and method, then what is not touched and why."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for step in content["steps"]:
        groups.setdefault((step["site"].partition(".")[0], step["label"]), []).append(step)
    titles = {"bytes": "bytes", "flops_per_token": "FLOPs/token", "cache_bytes_per_token": "cache B/token"}
    keys = [key for key in titles if content["before"][key] or content["after"][key]]
    table = _table("slot", "method", "sites", *(titles[key] for key in keys), wide="method")
    for (slot, label), steps in groups.items():
        table.add_row(slot, escape(label), str(len(steps)), *(_change(steps, key) for key in keys))
    cells = [_change([content], key) for key in keys]
    table.add_row("together", "", str(len(content["steps"])), *cells, style="bold")
    OUT.print(table)
    for step in content["steps"]:
        if step["note"]:
            OUT.print(f"{step['site']}: {escape(step['note'])}", highlight=False, soft_wrap=True)
    if content["untouched"]:
        OUT.print("not touched:")
        for row in content["untouched"]:
            OUT.print(f"  {escape(row['path'])}: {escape(row['reason'])}", highlight=False, soft_wrap=True)


def folder(content: dict[str, Any]) -> None:
    kind = f"compressed by taut {content['taut_version']}" if content["compressed"] else "not compressed"
    OUT.print(
        f"{escape(content['folder'])}: {content['model_type']} {content['architectures']}, {kind}, "
        f"{content['file_bytes']:,} bytes",
        highlight=False,
    )
    if content["compressed"]:
        OUT.print(f"recipe: {escape(str(content['recipe']))}", highlight=False)
        if content["healed"]:
            healed = ", ".join(f"{key} {_plain(value)}" for key, value in content["healed"].items())
            OUT.print(f"healed: {escape(healed)}", highlight=False)
        table = _table("site", "method", "knobs")
        for step in content["steps"]:
            table.add_row(*(escape(str(step[key])) for key in ("site", "method", "knobs")))
        OUT.print(table)


def scores(found: Iterable[Score]) -> None:
    table = _table("task", "metric", "score", "95 % interval", "baselines", "data")
    for score in found:
        quantity = score.quantity
        between = "-" if quantity.low is None else f"{quantity.low:.4f} to {quantity.high:.4f}"
        baselines = ", ".join(f"{name} {value:.4f}" for name, value in score.baselines.items())
        data = ", ".join(f"{name} {value[:32]}" for name, value in score.data.items())
        table.add_row(
            *(escape(text) for text in (score.task, score.metric, _value(quantity), between, baselines, data))
        )
    OUT.print(table)


def quantities(found: dict[str, Quantity]) -> None:
    table = _table("quantity", "value", "unit", "95 % interval", "how")
    for name, quantity in found.items():
        between = "-" if quantity.low is None else f"{quantity.low:.4g} to {quantity.high:.4g}"
        table.add_row(*(escape(text) for text in (name, _value(quantity), quantity.unit, between, quantity.how)))
    OUT.print(table)


def contexts(content: dict[str, Any]) -> None:
    """Print a line for each model, then how much each step of context lowers the perplexity of each model."""
    lengths, settings, count = content["contexts"], content["settings"], len(content["models"])
    table = _table("model", "effective context", "95 % interval", f"nats at {lengths[0]}", f"nats at {lengths[-1]}")
    for row in content["models"]:
        reached = f"{row['tokens']} or more" if row["at_least"] else str(row["tokens"])
        losses = (f"{row['losses'][place]:.4f}" for place in (0, -1))
        table.add_row(escape(row["model"]), reached, f"{row['low']} to {row['high']}", *losses)
    OUT.print(table)
    steps = _table("step", *(escape(row["model"]) for row in content["models"]))
    for place, length in enumerate(lengths[1:]):
        gains = (f"{row['gains'][place]:.4f}" for row in content["models"])
        steps.add_row(f"{lengths[place]} to {length}", *gains)
    OUT.print("share by which each step lowers the perplexity:")
    OUT.print(steps)
    OUT.print(
        f"in tokens, among these {count} models: {settings['positions']} tokens of {settings['data']['source']}, "
        f"the hardest {settings['hardest']:.0%} of them, threshold {settings['threshold']:g}",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )


def hits(rows: list[dict[str, Any]]) -> None:
    """Print each query, then its documents, best first."""
    for row in rows:
        OUT.print(escape(row["query"]), style="bold", highlight=False)
        for hit in row["hits"]:
            OUT.print(f"  {hit['score']:.4f}  {escape(hit['text'] or str(hit['id']))}", highlight=False)


def checks(rows: list[dict[str, Any]]) -> None:
    """Print the counts for each check, then every failure in full."""
    names = list(dict.fromkeys(row["check"] for row in rows))
    table = _table("check", "passed", "skipped", "failed")
    for name in names:
        counts = [sum(row["check"] == name and row["status"] == status for row in rows) for status in STATUSES]
        table.add_row(name, *(str(count) for count in counts))
    OUT.print(table)
    for row in rows:
        if row["status"] == "failed":
            OUT.print(f"failed: {row['check']} {escape(row['case'])}: {escape(row['reason'])}", highlight=False)


def outcome(found: Any, report: Path) -> None:
    """Print a table for each model of a run, then the path of the report."""
    from taut.reporting.tables import terminal

    rows = found.rows
    for model in dict.fromkeys(row.model for row in rows):
        OUT.print(terminal(rows, model))
    OUT.print(found.sentence(), highlight=False)
    if not found.interrupted:
        OUT.print(f"report: {escape(str(report))}", highlight=False)


def tuning(content: dict[str, Any]) -> None:
    """Print what ``taut tune`` measured, for each kind of map and number of threads."""
    lines: dict[tuple[str, int], list[str]] = {}
    for row in content["rows"]:
        speed = f"{row['tokens']}: {row['speed']['value']:.2f}"
        lines.setdefault((row["map"], row["threads"]), []).append(speed)
    OUT.print("tokens: how many times as fast as a dense copy")
    for (label, threads), speeds in lines.items():
        OUT.print(f"{label}, {threads} thread{'s' if threads > 1 else ''}", markup=False, highlight=False)
        OUT.print(f"    {'  '.join(speeds)}", highlight=False)
    copies = len(content["copies"])
    OUT.print(f"{copies} maps keep a dense copy for some numbers of tokens" if copies else "no dense copy is faster")


STATUSES = ("passed", "skipped", "failed")


def _table(*names: str, wide: str = "") -> Table:
    """A table of plain columns. With ``wide``, only the column of that name wraps in a narrow terminal."""
    table = Table(box=None, pad_edge=False)
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=bool(wide) and name != wide)
    return table


def _change(steps: list[dict[str, Any]], key: str) -> str:
    before, after = (sum(step[side][key] for step in steps) for side in ("before", "after"))
    if not before and not after:
        return "-"
    share = f" ({after / before:.0%})" if before else ""
    return f"{_short(before)} → {_short(after)}{share}"


def _short(number: float) -> str:
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} G"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _value(quantity: Quantity) -> str:
    if quantity.value is None:
        return "n/a"
    return f"{quantity.value:,.0f}" if quantity.unit == "bytes" else f"{quantity.value:.4g}"
