"""What the commands share: common arguments, and printing the JSON line."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from taut.cli import completion
from taut.core.errors import TautError

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="folder, Hub id, 'minilm' or scratch spec", autocompletion=completion.models),
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file or shipped recipe", autocompletion=completion.recipes)
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object as the last line of stdout; logs on stderr")]
Seed = Annotated[int, typer.Option(help="seed of all random numbers")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16; default: the checkpoint's own", autocompletion=completion.dtypes),
]
Threads = Annotated[int | None, typer.Option(min=1, help="processor threads; default: all")]


def finish(as_json: bool, content: dict[str, Any], text: Callable[[], None]) -> None:
    """Print ``content`` as one JSON object on the real stdout, or call ``text`` to print for people."""
    if as_json:
        print(json.dumps(content, default=str), file=sys.__stdout__, flush=True)
    else:
        text()


def without_none(**options: Any) -> dict[str, Any]:
    """The options that are not None."""
    return {key: value for key, value in options.items() if value is not None}


def pairs(items: list[str] | None) -> dict[str, Any]:
    """``key=value`` words as a dict. A value that is JSON is decoded. Raises TautError for a word without =."""
    options: dict[str, Any] = {}
    for item in items or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise TautError(f"{item!r}: expected key=value")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options
