"""Commands that judge models and compare them."""

from pathlib import Path
from typing import Annotated

import typer

from taut.cli.app import app
from taut.cli.options import Device, Dtype, Json, Model, Seed, Threads, finish, given, pairs


@app.command()
def evaluate(
    model: Model,
    task: Annotated[
        str,
        typer.Option(help="docs_retrieval, sts, perplexity, agreement, classify, ...; see docs"),
    ],
    data: Annotated[str | None, typer.Option(help="file or named data set; default: the task's own")] = None,
    reference: Annotated[str | None, typer.Option(help="the original MODEL, for agreement")] = None,
    option: Annotated[list[str] | None, typer.Option(help="further task options, key=value")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score a model on one task, beside the task's shortcut baselines."""
    from taut import api
    from taut.cli import tables

    api.use_threads(threads)
    options = pairs(option)
    with tables.progress(task) as step:
        scores = api.evaluate(
            model,
            task,
            data=data,
            reference=reference,
            seed=seed,
            device=device,
            dtype=dtype,
            progress=step,
            **options,
        )
    content = {"model": model, "scores": [score.model_dump(mode="json") for score in scores]}
    finish(as_json, content, lambda: tables.scores(scores))


@app.command()
def context(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="the group; all of one tokenizer")],
    data: Annotated[str, typer.Option(help="file or named text")] = "python_topics",
    shortest: Annotated[int, typer.Option(min=1, help="tokens of context to begin with")] = 64,
    step: Annotated[int, typer.Option(min=1, help="tokens more each time")] = 64,
    longest: Annotated[int, typer.Option(min=1, help="tokens of context to end with")] = 512,
    hardest: Annotated[float, typer.Option(help="share of the tokens that counts, the hardest")] = 0.1,
    threshold: Annotated[float, typer.Option(help="share of its perplexity that a step must gain")] = 0.01,
    positions: Annotated[int, typer.Option(min=1, help="tokens of the text to predict, evenly spread")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="windows run at once")] = 32,
    cached: Annotated[int | None, typer.Option(min=1, help="read so many tokens at a time through the cache")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how much of their context models use, relative to each other (RECL)."""
    from taut import api
    from taut.cli import tables

    api.use_threads(threads)
    with tables.progress("reading") as tell:
        found = api.context(
            models,
            data,
            shortest=shortest,
            step=step,
            longest=longest,
            hardest=hardest,
            threshold=threshold,
            positions=positions,
            batch_size=batch,
            cached=cached,
            seed=seed,
            device=device,
            dtype=dtype,
            progress=tell,
        )
    finish(as_json, found.to_dict(), lambda: tables.contexts(found.to_dict()))


@app.command()
def measure(
    model: Model,
    against: Annotated[str | None, typer.Option(help="another MODEL, for interleaved ratios")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    length: Annotated[int, typer.Option(min=1, help="tokens of the prompt or sentence")] = 128,
    decode: Annotated[int, typer.Option(min=0, help="tokens to decode (decoders)")] = 32,
    repeats: Annotated[int, typer.Option(min=2)] = 10,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure size, FLOPs, latency, throughput, peak memory, cache bytes and energy."""
    from taut import api
    from taut.cli import tables

    with tables.status("measuring") as tell:
        found = api.measure(
            model,
            against=against,
            device=device,
            dtype=dtype,
            seed=seed,
            batch=batch,
            length=length,
            decode=decode,
            repeats=repeats,
            threads=threads,
            progress=tell,
        )
    content = {"model": model, "quantities": {name: found[name].model_dump(mode="json") for name in found}}
    finish(as_json, content, lambda: tables.quantities(found))


@app.command()
def compare(
    study: Annotated[str, typer.Argument(metavar="STUDY|MODEL", help="a study's YAML file, or a MODEL")],
    recipes: Annotated[list[str] | None, typer.Option(help="with MODEL: recipe files, names, or a shipped set")] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", hidden=True)] = None,
    ledger: Annotated[Path | None, typer.Option(help="folder of the records; default: runs/STUDY")] = None,
    report: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="also write the pictures as PNG into this folder")] = None,
    only: Annotated[list[str] | None, typer.Option(help="run only these recipes of the study")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="with MODEL: the tasks; default: docs_retrieval, agreement")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="with MODEL: seeds")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: the study's own")] = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare recipes fairly, and draw the report. Interrupted, it resumes where it was."""
    from taut import api
    from taut.cli import tables

    outcome = api.compare(
        study,
        [*(recipes or []), *(more or [])],
        ledger=ledger,
        report=report,
        figures=figures,
        only=only or (),
        device=device,
        threads=threads,
        **given(tasks=task, dtype=dtype, seeds=seed),
    )
    content = outcome.to_dict() | {"report": None if outcome.interrupted else str(report)}
    finish(as_json, content, lambda: tables.outcome(outcome, report))
    raise typer.Exit(outcome.exit_code)


@app.command()
def report(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="folder of records")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="also write the pictures as PNG into this folder")] = None,
    as_json: Json = False,
) -> None:
    """Draw the report of a ledger again."""
    from taut import api

    api.report(ledger, out, figures=figures)
    finish(as_json, {"report": str(out), "figures": str(figures) if figures else None}, lambda: print(out))
