"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is."""


def silent(done: int, total: int) -> None:
    """Progress that is not shown."""
