"""Errors of the user, in one line: what was given, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class TautError(Exception):
    """A mistake in the input or options of the user. The command line prints it as one line and exits with code 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The end of an error message: ``did you mean 'x'? (choices: x, y)``. No question if no choice is similar."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(choices: {', '.join(choices) or 'none'})"
