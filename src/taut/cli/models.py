"""Commands that inspect, change and train models."""

from pathlib import Path
from typing import Annotated

import typer

import taut
from taut.api.sources import use_threads
from taut.cli import completion
from taut.cli.app import app
from taut.cli.options import Device, Dtype, Json, Model, RecipeName, Seed, Threads, finish, pairs
from taut.core.errors import TautError
from taut.core.slot import KINDS


@app.command()
def methods(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND", help=f"list only this kind: {', '.join(KINDS)}", autocompletion=completion.kinds
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the methods with what they do, their sources and their knobs."""
    from taut.cli import tables

    rows = taut.methods(kind)
    finish(as_json, {"methods": rows}, lambda: tables.methods(rows))


@app.command()
def plan(
    model: Model,
    recipe: RecipeName,
    length: Annotated[int | None, typer.Option(min=1, help="sequence length n for attention and memory costs")] = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do and cost. Read only the config of the model."""
    from taut.cli import tables

    result = taut.plan(model, recipe, length)
    finish(as_json, result.to_dict(), lambda: tables.show(result.table()))


@app.command()
def apply(
    model: Model,
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="folder to write; appears whole or not at all")],
    text: Annotated[
        str,
        typer.Option(
            help="text to calibrate and heal with: builtin, none, a file, or names: wikitext2:train,sst2:train",
            autocompletion=completion.data,
        ),
    ] = "builtin",
    exclude: Annotated[
        list[str] | None, typer.Option(help="evaluation data to keep out of that text, such as stsb:dev")
    ] = None,
    heal: Annotated[
        int, typer.Option(min=0, metavar="STEPS", help="then train the new parts to answer as the original did")
    ] = 0,
    heal_option: Annotated[
        list[str] | None, typer.Option(help="more options of healing, key=value: batch, length, target, train, ...")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compress a model and write a complete folder that AutoModel opens. Repeat the command to continue interrupted
    healing."""
    from taut.cli import tables

    if heal_option and not heal:
        raise TautError("--heal-option: works only with --heal STEPS; add that option")
    use_threads(threads)
    with tables.stages("fitting parts", *(["healing"] if heal else [])) as steps:
        compressed = taut.apply(
            model,
            recipe,
            out,
            text=None if text == "none" else text,
            exclude=exclude or (),
            heal={"steps": heal, **pairs(heal_option)} if heal or heal_option else 0,
            dtype=dtype,
            device=device,
            seed=seed,
            progress=steps[0],
            healing=steps[-1],
        )
    line = str(taut.footprint(compressed))
    finish(as_json, {"out": str(out), "footprint": line, **taut.show(out)}, lambda: print(f"{out}: {line}"))


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="YAML file of a training spec")],
    out: Annotated[Path | None, typer.Option(help="folder to write, whole or not at all; default: runs/SPEC")] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a language model, with or without a recipe. Repeat the command to continue an interrupted run. Start
    several processes with: torchrun --nproc-per-node 2 -m taut train SPEC."""
    from taut.cli import tables

    with tables.training(spec.stem) as progress:
        outcome = taut.train(spec, out, device=device, threads=threads, progress=progress)
    if outcome.main:
        content = {"folder": str(outcome.folder), **outcome.record}
        finish(as_json, content, lambda: print(outcome.sentence()))
    raise typer.Exit(outcome.exit_code)


@app.command()
def anchor_token(
    model: Model,
    out: Annotated[Path, typer.Option(help="folder to write; appears whole or not at all")],
    token: Annotated[str, typer.Option(help="the new token")] = "<anchor>",
    after: Annotated[list[str] | None, typer.Option(help="put it behind this string; default: . ! and ?")] = None,
    start: Annotated[str, typer.Option(help="first values of its row: mean, or a token whose row to copy")] = "mean",
    as_json: Json = False,
) -> None:
    """Add an anchor token to a model: a token that its tokenizer puts behind every sentence."""

    folder = taut.anchor_token(model, out, token=token, after=after or (".", "!", "?"), start=start)
    line = f"{folder}: train it with memory: {{method: anchor, anchors: [{token!r}]}}"
    finish(as_json, {"out": str(folder), "token": token}, lambda: print(line))


@app.command()
def tune(
    model: Annotated[Path, typer.Argument(metavar="FOLDER", help="a compressed model")],
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="thread counts to measure; default: all threads")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure where a dense copy of a structured map is faster on this machine, and store the choice in FOLDER."""
    from taut.cli import tables

    with tables.stages("measuring maps") as (progress,):
        tuning = taut.tune(model, threads or (), progress=progress)
    finish(as_json, tuning.to_dict(), lambda: tables.tuning(tuning.to_dict()))


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    as_json: Json = False,
) -> None:
    """Show what is inside a folder: recipe, parts, tensors, bytes."""
    from taut.cli import tables

    content = taut.show(folder)
    finish(as_json, content, lambda: tables.folder(content))


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="FOLDER")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    dense: Annotated[bool, typer.Option("--dense", help="merge every part into dense weights")] = False,
    as_json: Json = False,
) -> None:
    """Write a plain dense checkpoint, for tools without taut."""

    if not dense:
        raise TautError("export: add --dense; taut exports only dense checkpoints")
    kept = taut.export(folder, out)

    def text() -> None:
        print(f"{out}: plain dense checkpoint")
        for name, reason in kept:
            print(f"not merged: {name}: {reason}")

    finish(as_json, {"out": str(out), "not_merged": [{"site": name, "reason": why} for name, why in kept]}, text)
