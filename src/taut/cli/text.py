"""Commands that write text, and prepare for it."""

from pathlib import Path
from typing import Annotated

import typer

from taut.cli.app import app
from taut.cli.options import Device, Dtype, Json, Model, Seed, Threads, finish
from taut.core.errors import TautError


@app.command()
def prefix(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="CACHE", help="file to write; appears whole or not at all")],
    text_file: Annotated[Path | None, typer.Option(metavar="F", help="what every text will begin with")] = None,
    text: Annotated[str | None, typer.Option(help="the same, as words")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Read a text once and keep what the model's cache holds of it, for `taut generate --prefix`."""
    from taut import api

    api.use_threads(threads)
    found = api.prefix(model, _said(text, text_file, "--text"), out=out, device=device, dtype=dtype)
    content = {"out": str(out), "tokens": len(found.ids), "entries": found.entries, "cache_bytes": found.bytes}
    line = f"{out}: {len(found.ids)} tokens, {found.entries} cache entries, {found.bytes:,} bytes"
    finish(as_json, content, lambda: print(line))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="what to go on from")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="F", help="a file with the prompt")] = None,
    prefix: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="what `taut prefix` wrote for this model")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="at most so many new ones")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token")] = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt; the text comes as it is made, then its speed and the size of its cache."""
    from taut import api

    api.use_threads(threads)
    said = _said(prompt, prompt_file, "--prompt")
    # The prompt is shown once there is something to show behind it.
    shown = iter([said])

    def show(piece: str) -> None:
        print(next(shown, ""), piece, sep="", end="", flush=True)

    found = api.generate(
        model,
        said,
        prefix=prefix,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        tell=(lambda piece: None) if as_json else show,
    )
    finish(as_json, found.to_dict(), lambda: print(f"\n{found.sentence()}"))


def _said(words: str | None, file: Path | None, option: str) -> str:
    """Words, or what a file says. Raises TautError for both, for neither, and for a file that cannot be read."""
    if (words is None) == (file is None):
        raise TautError(f"give {option} or {option}-file" + ("" if words is None else ", not both"))
    if words is not None:
        return words
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TautError(f"{file}: cannot read it as UTF-8 text: {error}") from None
