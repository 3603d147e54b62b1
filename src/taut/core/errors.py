"""What the user did wrong, in one line: what was given, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class TautError(Exception):
    """A mistake in what taut was given. The command line prints it as one line and exits with code 2."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """The tail of an error message that teaches: ``did you mean 'x'? (choices: x, y)``."""
    choices = sorted(choices)
    close = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}(choices: {', '.join(choices) or 'none'})"
