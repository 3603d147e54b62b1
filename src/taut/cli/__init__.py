"""Words, then a verb, then printing. Nothing heavy is imported before a verb is called."""

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
    """The entry point: a mistake in the input is one line on stderr and exit code 2."""
    as_json = "--json" in sys.argv
    # Our own progress is enough; transformers' bar for every file would run through it.
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
    """Libraries that print end up on stderr when stdout is for a script."""
    original = sys.stdout
    if as_json:
        sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = original
