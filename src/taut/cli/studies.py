"""Commands that score, measure and compare models."""

from pathlib import Path
from typing import Annotated

import typer

import taut
from taut.api.sources import use_threads
from taut.cli import completion
from taut.cli.app import app
from taut.cli.options import Device, Dtype, Json, Model, Seed, Threads, finish, pairs, without_none


@app.command()
def evaluate(
    model: Model,
    task: Annotated[
        str,
        typer.Option(
            help="task to run: docs_retrieval, sts, perplexity, agreement, classify, ...; see docs",
            autocompletion=completion.tasks,
        ),
    ],
    data: Annotated[
        str | None,
        typer.Option(help="file or named data set; default: the task's own", autocompletion=completion.data),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="the original MODEL, for agreement", autocompletion=completion.models)
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="more options of the task, key=value")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Score a model on one task, beside the task's shortcut baselines."""
    from taut.cli import tables

    use_threads(threads)
    options = pairs(option)
    with tables.progress(task) as step:
        scores = taut.evaluate(
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
    content = {"model": model, **scores.to_dict()}
    finish(as_json, content, lambda: tables.show(scores.table()))


@app.command()
def context(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="models to compare, all with one tokenizer", autocompletion=completion.models
        ),
    ],
    data: Annotated[str, typer.Option(help="file or named text", autocompletion=completion.data)] = "python_topics",
    shortest: Annotated[int, typer.Option(min=1, help="shortest context, in tokens")] = 64,
    step: Annotated[int, typer.Option(min=1, help="tokens to add at each step")] = 64,
    longest: Annotated[int, typer.Option(min=1, help="longest context, in tokens")] = 512,
    hardest: Annotated[float, typer.Option(help="share of the tokens that count: the hardest ones")] = 0.1,
    threshold: Annotated[float, typer.Option(help="share by which a step must lower the perplexity")] = 0.01,
    positions: Annotated[int, typer.Option(min=1, help="tokens to predict, evenly spread over the text")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="windows run at once")] = 32,
    cached: Annotated[int | None, typer.Option(min=1, help="use the cache, with this many tokens at a time")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Measure how much of their context models use, relative to each other (RECL)."""
    from taut.cli import tables

    use_threads(threads)
    with tables.progress("reading") as progress:
        contexts = taut.context(
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
            progress=progress,
        )
    finish(as_json, contexts.to_dict(), lambda: tables.contexts(contexts))


@app.command()
def measure(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option(help="another MODEL, for interleaved latency ratios", autocompletion=completion.models),
    ] = None,
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
    from taut.cli import tables

    with tables.status("measuring") as progress:
        costs = taut.measure(
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
            progress=progress,
        )
    content = {"model": model, "quantities": costs.to_dict()}
    finish(as_json, content, lambda: tables.show(costs.table()))


@app.command()
def compare(
    study: Annotated[
        str,
        typer.Argument(
            metavar="STUDY|MODEL", help="YAML file of a study, or a MODEL", autocompletion=completion.models
        ),
    ],
    recipes: Annotated[
        list[str] | None,
        typer.Option(
            help="with MODEL: recipe files, names, or a shipped set", autocompletion=completion.recipes_and_sets
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[RECIPE]...", hidden=True)] = None,
    ledger: Annotated[Path | None, typer.Option(help="folder of records; default: runs/STUDY")] = None,
    report: Annotated[Path, typer.Option(help="page to write")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="also write the figures as PNG files into this folder")] = None,
    only: Annotated[list[str] | None, typer.Option(help="run only these recipes of the study")] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="with MODEL: the tasks; default: docs_retrieval, agreement", autocompletion=completion.tasks),
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="with MODEL: seeds")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; default: the study's own")] = None,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare recipes under equal conditions and draw the report. Repeat the command to continue an interrupted run."""
    from taut.cli import tables

    outcome = taut.compare(
        study,
        [*(recipes or []), *(more or [])],
        ledger=ledger,
        report=report,
        figures=figures,
        only=only or (),
        device=device,
        threads=threads,
        **without_none(tasks=task, dtype=dtype, seeds=seed),
    )
    content = outcome.to_dict() | {"report": None if outcome.interrupted else str(report)}
    finish(as_json, content, lambda: tables.outcome(outcome, report))
    raise typer.Exit(outcome.exit_code)


@app.command()
def report(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="folder of records")],
    out: Annotated[Path, typer.Option(help="page to write")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="also write the figures as PNG files into this folder")] = None,
    csv: Annotated[Path | None, typer.Option(help="also write all numbers, unrounded, as a CSV file")] = None,
    as_json: Json = False,
) -> None:
    """Draw the report of a ledger again."""

    taut.report(ledger, out, figures=figures, csv=csv)
    written = {"report": out, "figures": figures, "csv": csv}
    content = {name: str(path) if path else None for name, path in written.items()}
    finish(as_json, content, lambda: print(*(path for path in (out, csv) if path), sep="\n"))
