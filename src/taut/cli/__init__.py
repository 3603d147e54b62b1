"""The command line: reads the arguments, calls the api, prints the result. Heavy imports wait until a command runs."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from taut.cli import models, studies, text, tools, vectors
from taut.cli.app import app
from taut.core.errors import TautError

__all__ = ["app", "main", "models", "studies", "text", "tools", "vectors"]


def main() -> None:
    """The entry point. Wrong input gives one line on stderr and exit code 2."""
    as_json = "--json" in sys.argv
    # transformers' own bar for every file would disturb our progress display.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with _quiet_stdout(as_json):
            app()
    except TautError as error:
        print(f"error: {error}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": str(error)}))
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def _quiet_stdout(as_json: bool) -> Iterator[None]:
    """With ``as_json``, send everything that libraries print to stderr, because a script reads stdout."""
    original = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = original
