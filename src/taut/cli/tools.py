"""Commands for authors of methods, and for other programs."""

from typing import Annotated

import typer

import taut
from taut.cli import completion
from taut.cli.app import app
from taut.cli.options import Device, Json, finish, pairs
from taut.core.errors import TautError


@app.command()
def check(
    method: Annotated[
        str,
        typer.Argument(
            metavar="METHOD",
            help="an id such as embedding.low_bit, or a name that only one method has, such as block_dense",
            autocompletion=completion.methods,
        ),
    ],
    family: Annotated[
        list[str] | None, typer.Option(help="tiny model families to try; default: four representatives")
    ] = None,
    knob: Annotated[list[str] | None, typer.Option(help="knob, key=value; replaces the method's own test row")] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Run the contract suite on one method, for example your own."""
    from taut.cli import tables

    rows = taut.check(method, family or (), pairs(knob) or None, device=device)
    failed = any(row["status"] == "failed" for row in rows)
    finish(as_json, {"method": method, "passed": not failed, "rows": rows}, lambda: tables.checks(rows))
    if failed:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Run another program with taut imported in its Python: taut run -- lm_eval --model hf ..."""
    from taut.cli import run_with_taut

    if not context.args:
        raise TautError("run: name a command after --, for example: taut run -- python script.py")
    raise typer.Exit(run_with_taut.run(context.args))
