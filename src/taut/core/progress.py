"""How long computations report their progress."""

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the amount that is done and the total amount."""


def silent(done: int, total: int) -> None:
    """Progress that is not shown."""
