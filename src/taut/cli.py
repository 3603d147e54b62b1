"""Words, then a verb, then printing. Nothing heavy is imported before a verb is called."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from taut.core.errors import TautError
from taut.options import Device, Dtype, Json, Model, RecipeName, Seed, Threads, finish, given, pairs

app = typer.Typer(
    name="taut",
    help="Efficient parts for any Hugging Face transformer, and an honest account of what each part costs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="MODEL is a folder, a Hub id, 'minilm' (packaged), or a scratch spec such as llama:hidden_size=256. "
    "RECIPE is a YAML file or the name of a shipped recipe.",
)


class Kind(StrEnum):
    embedding = "embedding"
    linear = "linear"
    attention = "attention"
    memory = "memory"


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="print the version and leave", is_eager=True)] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(f"taut {installed('taut')}")
        raise typer.Exit


@app.command()
def methods(
    kind: Annotated[Kind | None, typer.Argument(help="only this kind")] = None,
    as_json: Json = False,
) -> None:
    """List the methods: what they are, where they come from, their knobs."""
    from taut import display, verbs

    rows = verbs.methods(kind.value if kind else None)
    finish(as_json, {"methods": rows}, lambda: display.methods(rows))


@app.command()
def plan(
    model: Model,
    recipe: RecipeName,
    length: Annotated[int | None, typer.Option(min=1, help="declared n of attention and memory costs")] = None,
    as_json: Json = False,
) -> None:
    """Show what a recipe would do and cost, from the config alone."""
    from taut import display, verbs

    found = verbs.plan(model, recipe, length)
    finish(as_json, found.to_dict(), lambda: display.plan(found.to_dict()))


@app.command()
def apply(
    model: Model,
    recipe: RecipeName,
    out: Annotated[Path, typer.Option(help="folder to write; appears whole or not at all")],
    text: Annotated[
        str,
        typer.Option(help="to calibrate and heal with: builtin, none, a file, or names: wikitext2:train,sst2:train"),
    ] = "builtin",
    exclude: Annotated[
        list[str] | None, typer.Option(help="evaluation data of which no sentence may be read, such as stsb:dev")
    ] = None,
    heal: Annotated[
        int, typer.Option(min=0, metavar="STEPS", help="then train what was installed to answer as the original did")
    ] = 0,
    heal_option: Annotated[
        list[str] | None, typer.Option(help="further choices of healing, key=value: batch, length, target, train, ...")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Tighten a model and write a complete folder that AutoModel opens. Healing that was cut off goes on when the
    command is repeated."""
    from taut import display, verbs

    if heal_option and not heal:
        raise TautError("--heal-option: say --heal STEPS as well")
    verbs.use_threads(threads)
    with display.stages("fitting parts", *(["healing"] if heal else [])) as steps:
        tightened = verbs.apply(
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
    line = verbs.footprint(tightened)
    finish(as_json, {"out": str(out), "footprint": line, **verbs.show(out)}, lambda: print(f"{out}: {line}"))


@app.command()
def train(
    spec: Annotated[Path, typer.Argument(metavar="SPEC", help="a training spec's YAML file")],
    out: Annotated[Path | None, typer.Option(help="folder to write, whole or not at all; default: runs/SPEC")] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a language model, with or without a recipe. Cut off, it goes on when the command is repeated. Several
    processes: torchrun --nproc-per-node 2 -m taut train SPEC."""
    from taut import display, verbs

    with display.training(spec.stem) as tell:
        outcome = verbs.train(spec, out, device=device, threads=threads, progress=tell)
    if outcome.main:
        content = {"folder": str(outcome.folder), **outcome.record}
        finish(as_json, content, lambda: print(outcome.sentence()))
    raise typer.Exit(outcome.exit_code)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER")],
    as_json: Json = False,
) -> None:
    """Show what is inside a folder: recipe, parts, tensors, bytes."""
    from taut import display, verbs

    found = verbs.show(folder)
    finish(as_json, found, lambda: display.folder(found))


@app.command()
def export(
    folder: Annotated[str, typer.Argument(metavar="FOLDER")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    dense: Annotated[bool, typer.Option("--dense", help="merge every part into dense weights")] = False,
    as_json: Json = False,
) -> None:
    """Write a plain dense checkpoint, for tools that do not know taut."""
    from taut import verbs

    if not dense:
        raise TautError("export: say --dense; it is the only form there is")
    kept = verbs.export(folder, out)

    def text() -> None:
        print(f"{out}: plain dense checkpoint")
        for name, reason in kept:
            print(f"not merged: {name}: {reason}")

    finish(as_json, {"out": str(out), "not_merged": [{"site": name, "reason": why} for name, why in kept]}, text)


@app.command()
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(help="docs_retrieval, sts, perplexity, agreement, classify")],
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
    from taut import display, verbs

    verbs.use_threads(threads)
    options = pairs(option)
    with display.progress(task) as step:
        scores = verbs.evaluate(
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
    finish(as_json, content, lambda: display.scores(scores))


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
    from taut import display, verbs

    with display.status("measuring") as tell:
        found = verbs.measure(
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
    finish(as_json, content, lambda: display.quantities(found))


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
    from taut import display, verbs

    outcome = verbs.compare(
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
    finish(as_json, content, lambda: display.outcome(outcome, report))
    raise typer.Exit(outcome.exit_code)


@app.command()
def index(
    model: Model,
    documents: Annotated[str, typer.Argument(metavar="TEXT", help="file or named text: paragraphs, else lines")],
    out: Annotated[Path, typer.Option(help="folder to write; appears whole or not at all")],
    code: Annotated[str, typer.Option(help="how vectors are kept: float, int8, binary, pq")] = "int8",
    width: Annotated[int | None, typer.Option(min=1, help="numbers kept of each vector")] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="principal directions first, before --width")] = False,
    bytes: Annotated[int | None, typer.Option(min=1, help="bytes a vector, for pq")] = None,
    finer: Annotated[str | None, typer.Option(help="second code, to score the best again")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Index the paragraphs of a text by their sentence vectors, in few bytes."""
    from taut import display, verbs

    verbs.use_threads(threads)
    kept = {"code": code, "width": width, "rotate": rotate, "bytes": bytes, "finer": finer}
    with display.progress("encoding") as step:
        built = verbs.index(model, documents, out, device=device, dtype=dtype, seed=seed, progress=step, **kept)
    facts = {"out": str(out), "documents": len(built), "width": built.width, "bytes_per_vector": built.bytes_per_vector}
    text = f"{out}: {len(built):,} documents, {built.bytes_per_vector:,} bytes each"
    finish(as_json, facts, lambda: print(text))


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="folder that taut index wrote")],
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...")],
    k: Annotated[int, typer.Option("--k", min=1, help="documents for each query")] = 5,
    model: Annotated[str | None, typer.Option(help="MODEL; default: the one the index was made with")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the documents of an index that are nearest to a query."""
    from taut import display, verbs

    verbs.use_threads(threads)
    found = verbs.search(folder, queries, k, model=model, device=device, dtype=dtype)
    rows = [{"query": query, "hits": hits} for query, hits in zip(queries, found, strict=True)]
    finish(as_json, {"queries": rows}, lambda: display.hits(rows))


@app.command()
def report(
    ledger: Annotated[Path, typer.Argument(metavar="LEDGER", help="folder of records")],
    out: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    figures: Annotated[Path | None, typer.Option(help="also write the pictures as PNG into this folder")] = None,
    as_json: Json = False,
) -> None:
    """Draw the report of a ledger again."""
    from taut import verbs

    verbs.report(ledger, out, figures=figures)
    finish(as_json, {"report": str(out), "figures": str(figures) if figures else None}, lambda: print(out))


@app.command()
def check(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="an id such as embedding.low_bit")],
    family: Annotated[
        list[str] | None, typer.Option(help="tiny families to try; default: four representatives")
    ] = None,
    knob: Annotated[list[str] | None, typer.Option(help="key=value instead of the method's own test row")] = None,
    as_json: Json = False,
) -> None:
    """Run the contract suite on one method, yours included."""
    from taut import display, verbs

    rows = verbs.check(method, family or (), pairs(knob) or None)
    failed = any(row["status"] == "failed" for row in rows)
    finish(as_json, {"method": method, "passed": not failed, "rows": rows}, lambda: display.checks(rows))
    if failed:
        raise typer.Exit(1)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(context: typer.Context) -> None:
    """Run any command with taut imported in its Python: taut run -- lm_eval --model hf ..."""
    from taut import launch

    if not context.args:
        raise TautError("run: name a command after --, for example: taut run -- python script.py")
    raise typer.Exit(launch.run(context.args))


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
