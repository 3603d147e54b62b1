"""Commands that generate text and prepare prefixes."""

from pathlib import Path
from typing import Annotated

import typer

import taut
from taut.api.sources import use_threads
from taut.cli.app import app
from taut.cli.options import Device, Dtype, Json, Model, Seed, Threads, finish
from taut.core.errors import TautError


@app.command()
def prefix(
    model: Model,
    out: Annotated[Path, typer.Option(metavar="CACHE", help="file to write; appears whole or not at all")],
    text_file: Annotated[
        Path | None, typer.Option(metavar="F", help="file with the text that prompts begin with")
    ] = None,
    text: Annotated[str | None, typer.Option(help="that text itself")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Read a text once and save the model's cache of it, for `taut generate --prefix`."""

    use_threads(threads)
    result = taut.prefix(model, _text_of(text, text_file, "--text"), out=out, device=device, dtype=dtype)
    content = {"out": str(out), "tokens": len(result.ids), "entries": result.entries, "cache_bytes": result.bytes}
    line = f"{out}: {len(result.ids)} tokens, {result.entries} cache entries, {result.bytes:,} bytes"
    finish(as_json, content, lambda: print(line))


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    prompt_file: Annotated[Path | None, typer.Option(metavar="F", help="file with the prompt")] = None,
    prefix: Annotated[
        Path | None, typer.Option(metavar="CACHE", help="file that `taut prefix` wrote for this model")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="generate at most this many tokens")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: always take the most likely token")] = 0.0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue a prompt and print the text as it is generated, then its speed and the size of its cache."""

    use_threads(threads)
    prompt = _text_of(prompt, prompt_file, "--prompt")
    # The prompt is shown together with the first piece of new text.
    shown = iter([prompt])

    def show(piece: str) -> None:
        print(next(shown, ""), piece, sep="", end="", flush=True)

    result = taut.generate(
        model,
        prompt,
        prefix=prefix,
        tokens=tokens,
        temperature=temperature,
        seed=seed,
        device=device,
        dtype=dtype,
        on_text=(lambda piece: None) if as_json else show,
    )
    finish(as_json, result.to_dict(), lambda: print(f"\n{result.sentence()}"))


def _text_of(words: str | None, file: Path | None, option: str) -> str:
    """The given words, or the content of a file. Raises TautError for both, neither, and an unreadable file."""
    if (words is None) == (file is None):
        raise TautError(f"give {option} or {option}-file" + ("" if words is None else ", not both"))
    if words is not None:
        return words
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TautError(f"{file}: cannot read it as UTF-8 text: {error}") from None
