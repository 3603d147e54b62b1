"""The typer application that holds all commands."""

from typing import Annotated

import typer

app = typer.Typer(
    name="taut",
    help="Efficient parts for any Hugging Face transformer, and an honest account of what each part costs.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="MODEL is a folder, a Hub id, 'minilm' (packaged), a name in TAUT_MODELS, or a scratch spec such as "
    "llama:hidden_size=256. "
    "RECIPE is a YAML file or the name of a shipped recipe.",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"taut {installed('taut')}")
        raise typer.Exit
