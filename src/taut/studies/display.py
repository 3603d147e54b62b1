"""Shows the progress of a run to the user, on standard error."""

import sys
from abc import ABC, abstractmethod
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from taut.core.spec import TrialSpec


class Display(ABC):
    """Abstract: shows the progress of a run. Everything goes to standard error."""

    @abstractmethod
    def say(self, text: str) -> None:
        """Print one line that stays."""

    @abstractmethod
    def begin(self, spec: TrialSpec, number: int, total: int) -> None:
        """Show that trial ``number`` of ``total`` starts."""

    @abstractmethod
    def step(self, text: str) -> None:
        """Show what the trial is doing now."""

    @abstractmethod
    def end(self) -> None:
        """Show that the trial is over."""

    def close(self) -> None:
        """Stop the display at the end of the run."""


class PlainDisplay(Display):
    """Prints plain lines, for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def begin(self, spec: TrialSpec, number: int, total: int) -> None:
        self.say(f"[{number}/{total}] {spec.name}")

    def step(self, text: str) -> None:
        self.say(f"    {text}")

    def end(self) -> None:
        pass


class LiveDisplay(Display):
    """Shows a moving bar, for terminals."""

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=console or Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None
        self._name = ""

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def begin(self, spec: TrialSpec, number: int, total: int) -> None:
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=total)
        self._name = spec.recipe_name
        self._progress.update(self._task, completed=number - 1, description=self._name)

    def step(self, text: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=f"{self._name}: {text}")

    def end(self) -> None:
        if self._task is not None:
            self._progress.advance(self._task)

    def close(self) -> None:
        self._progress.stop()


def open_display() -> Display:
    """A live bar on a terminal, plain lines elsewhere."""
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()
