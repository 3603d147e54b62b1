"""Prints tables and progress for people. Progress goes to stderr, results to stdout."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import fill
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
from rich.text import Text

from taut.core.table import Table
from taut.reporting.tables import terminal

OUT = Console()
"""As wide as the terminal. Without one, as the variable COLUMNS says, else 80."""
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


def show(table: Table, *, ruled: bool = False) -> None:
    """Print a table, then its notes. ``ruled`` is for cells of two lines."""
    OUT.print(terminal(table, OUT.width, ruled=ruled), overflow="ignore", crop=False)
    for note in table.notes:
        say(note)


def say(text: str, style: str = "") -> None:
    """Print prose: in lines of whole words on a terminal, as one line in a pipe."""
    if OUT.is_terminal:
        text = fill(text, OUT.width, break_long_words=False, break_on_hyphens=False)
    OUT.print(Text(text, style), soft_wrap=True)


def methods(rows: list[dict[str, Any]]) -> None:
    lines = []
    for row in rows:
        knobs = ", ".join(f"{name}={knob['default']}" for name, knob in row["knobs"].items())
        lines.append((row["id"], row["summary"], row["dial"] or "-", knobs))
    show(Table(("method", "what it does", "dial", "knobs"), lines))
    say("sources and costs: docs/methods, or taut methods --json")


def folder(content: dict[str, Any]) -> None:
    kind = f"compressed by taut {content['taut_version']}" if content["compressed"] else "not compressed"
    say(
        f"{content['folder']}: {content['model_type']} {content['architectures']}, {kind}, "
        f"{content['file_bytes']:,} bytes"
    )
    if content["compressed"]:
        say(f"recipe: {content['recipe']}")
        if content["healed"]:
            healed = ", ".join(f"{key} {_plain(value)}" for key, value in content["healed"].items())
            say(f"healed: {healed}")
        lines = [[str(step[key]) for key in ("site", "method", "knobs")] for step in content["steps"]]
        show(Table(("site", "method", "knobs"), lines))


def contexts(result: Any) -> None:
    """Print a line for each model, then how much each step of context lowers the perplexity of each model."""
    content = result.to_dict()
    lengths, settings, count = content["contexts"], content["settings"], len(content["models"])
    show(result.table())
    steps = []
    for place, length in enumerate(lengths[1:]):
        gains = (f"{row['gains'][place]:.4f}" for row in content["models"])
        steps.append((f"{lengths[place]} to {length}", *gains))
    say("share by which each step lowers the perplexity:")
    show(Table(("step", *(row["model"] for row in content["models"])), steps))
    say(
        f"in tokens, among these {count} models: {settings['positions']} tokens of {settings['data']['source']}, "
        f"the hardest {settings['hardest']:.0%} of them, threshold {settings['threshold']:g}"
    )


def hits(rows: list[dict[str, Any]]) -> None:
    """Print each query, then its documents, best first."""
    for row in rows:
        say(row["query"], "bold")
        for hit in row["hits"]:
            say(f"  {hit['score']:.4f}  {hit['text'] or str(hit['id'])}")


def checks(rows: list[dict[str, Any]]) -> None:
    """Print the counts for each check, then every failure in full."""
    names = list(dict.fromkeys(row["check"] for row in rows))
    lines = []
    for name in names:
        counts = [sum(row["check"] == name and row["status"] == status for row in rows) for status in STATUSES]
        lines.append((name, *(str(count) for count in counts)))
    show(Table(("check", *STATUSES), lines))
    for row in rows:
        if row["status"] == "failed":
            say(f"failed: {row['check']} {row['case']}: {row['reason']}")


def outcome(result: Any, report: Path) -> None:
    """Print a table for each model of a run, then the path of the report."""
    for table in result.rows.tables():
        show(table, ruled=True)
    say(result.sentence())
    if not result.interrupted:
        say(f"report: {report}")


def tuning(content: dict[str, Any]) -> None:
    """Print what ``taut tune`` measured, for each kind of map and number of threads."""
    lines: dict[tuple[str, int], list[str]] = {}
    for row in content["rows"]:
        speed = f"{row['tokens']}: {row['speed']['value']:.2f}"
        lines.setdefault((row["map"], row["threads"]), []).append(speed)
    say("tokens: how many times as fast as a dense copy")
    for (label, threads), speeds in lines.items():
        say(f"{label}, {threads} thread{'s' if threads > 1 else ''}")
        say(f"    {'  '.join(speeds)}")
    copies = len(content["copies"])
    say(f"{copies} maps keep a dense copy for some numbers of tokens" if copies else "no dense copy is faster")


STATUSES = ("passed", "skipped", "failed")


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
