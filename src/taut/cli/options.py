"""What the commands share: arguments that mean the same everywhere, and the one JSON line."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from taut.core.errors import TautError

Model = Annotated[str, typer.Argument(metavar="MODEL", help="folder, Hub id, 'minilm' or scratch spec")]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="YAML file or shipped recipe")]
Json = Annotated[bool, typer.Option("--json", help="one JSON object as the last line of stdout; logs on stderr")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; default: the checkpoint's own")]
Threads = Annotated[int | None, typer.Option(min=1, help="processor threads; default: all")]


def finish(as_json: bool, content: dict[str, Any], text: Callable[[], None]) -> None:
    """``content`` as one JSON object on the real stdout, or whatever ``text`` prints."""
    if as_json:
        print(json.dumps(content, default=str), file=sys.__stdout__, flush=True)
    else:
        text()


def given(**options: Any) -> dict[str, Any]:
    """Only what was said."""
    return {key: value for key, value in options.items() if value is not None}


def pairs(items: list[str] | None) -> dict[str, Any]:
    """``key=value`` words as a dict; a value that is JSON is read as such. Raises TautError for a word without =."""
    found: dict[str, Any] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise TautError(f"{item!r}: expected key=value")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
