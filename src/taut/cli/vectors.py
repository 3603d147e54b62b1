"""Commands for sentence vectors."""

from pathlib import Path
from typing import Annotated

import typer

import taut
from taut.api.sources import use_threads
from taut.cli import completion
from taut.cli.app import app
from taut.cli.options import Device, Dtype, Json, Model, Seed, Threads, finish


@app.command()
def index(
    model: Model,
    documents: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            help="file or named text; split into paragraphs, else lines",
            autocompletion=completion.data,
        ),
    ],
    out: Annotated[Path, typer.Option(help="folder to write; appears whole or not at all")],
    code: Annotated[str, typer.Option(help="how to store vectors: float, int8, binary, pq")] = "int8",
    width: Annotated[int | None, typer.Option(min=1, help="numbers to keep of each vector")] = None,
    rotate: Annotated[
        bool, typer.Option("--rotate", help="rotate principal directions first, then cut to --width")
    ] = False,
    bytes: Annotated[int | None, typer.Option(min=1, help="bytes per vector, for pq")] = None,
    finer: Annotated[str | None, typer.Option(help="second code, to rescore the best documents")] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Index the paragraphs of a text by compact sentence vectors."""
    from taut.cli import tables

    use_threads(threads)
    kept = {"code": code, "width": width, "rotate": rotate, "bytes": bytes, "finer": finer}
    with tables.progress("encoding") as step:
        built = taut.index(model, documents, out, device=device, dtype=dtype, seed=seed, progress=step, **kept)
    facts = {"out": str(out), "documents": len(built), "width": built.width, "bytes_per_vector": built.bytes_per_vector}
    text = f"{out}: {len(built):,} documents, {built.bytes_per_vector:,} bytes each"
    finish(as_json, facts, lambda: print(text))


@app.command()
def search(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="folder that taut index wrote")],
    queries: Annotated[list[str], typer.Argument(metavar="QUERY...")],
    k: Annotated[int, typer.Option("--k", min=1, help="documents for each query")] = 5,
    model: Annotated[
        str | None,
        typer.Option(help="MODEL; default: the one that made the index", autocompletion=completion.models),
    ] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the documents of an index that are nearest to a query."""
    from taut.cli import tables

    use_threads(threads)
    results = taut.search(folder, queries, k, model=model, device=device, dtype=dtype)
    rows = [{"query": query, "hits": hits} for query, hits in zip(queries, results, strict=True)]
    finish(as_json, {"queries": rows}, lambda: tables.hits(rows))
