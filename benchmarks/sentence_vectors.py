"""Sentence vectors of all-MiniLM-L6-v2 in fewer bytes: retrieval on Python's own reference pages, and search time."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from harness import options, record
from torch import Tensor
from torch.nn import functional as F

import taut
from taut import data
from taut.core.record import Quantity
from taut.evaluation.tasks.docs_retrieval import DEPTH, DocsRetrieval, ranks_of_own, reciprocal
from taut.measurement.clock import compare, ratio
from taut.retrieval.index import Index
from taut.studies.statistics import paired_bootstrap

CLAIM = (
    "minilm on docs_retrieval: int8 vectors (4x smaller), 192 principal numbers in int8 (8x) and bits rescored by int8 "
    "lose at most .01 MRR@10; one query is answered from bits >= 5x faster than from float vectors"
)
MOST, FASTER = 0.01, 5.0
CALIBRATION = 2500
"""Paragraphs of Python's docstrings; none shares a sentence with the passages."""
DOCUMENTS, QUERIES = 50_000, 64
"""Of the timing, with random vectors: time depends on shapes alone."""


@dataclass(frozen=True)
class Case:
    """How an index is built and asked; ``most`` is the loss of MRR that the claim allows."""

    build: dict[str, Any]
    ask: dict[str, Any] = field(default_factory=dict)
    most: float | None = None
    own: bool = False
    """Fitted on the passages themselves, as a user's index is unless told otherwise; the others on docstrings."""


TURNED = {"rotate": True}
CASES = {
    "float": Case({"code": "float"}),
    "int8": Case({"code": "int8"}, most=MOST),
    "binary, Hamming": Case({"code": "binary"}, {"symmetric": True}),
    "binary": Case({"code": "binary"}),
    "binary, Hamming, 40 rescored": Case({"code": "binary"}, {"candidates": 40}),
    "binary, 40 rescored by int8": Case({"code": "binary", "finer": "int8"}, {"candidates": 40}, most=MOST),
    "binary, 40 rescored by float": Case({"code": "binary", "finer": "float"}, {"candidates": 40}),
    "pq, 96 bytes": Case({"code": "pq", "bytes": 96}),
    "pq, 48 bytes": Case({"code": "pq", "bytes": 48}),
    "pq, 24 bytes": Case({"code": "pq", "bytes": 24}),
    "pq, 24 bytes, 40 rescored by int8": Case({"code": "pq", "bytes": 24, "finer": "int8"}, {"candidates": 40}),
    "first 192": Case({"code": "float", "width": 192}),
    "first 96": Case({"code": "float", "width": 96}),
    "first 48": Case({"code": "float", "width": 48}),
    "192 principal": Case({"code": "float", "width": 192} | TURNED),
    "96 principal": Case({"code": "float", "width": 96} | TURNED),
    "48 principal": Case({"code": "float", "width": 48} | TURNED),
    "96 principal, own": Case({"code": "float", "width": 96} | TURNED, own=True),
    "first 192, int8": Case({"code": "int8", "width": 192}),
    "192 principal, int8": Case({"code": "int8", "width": 192} | TURNED, most=MOST),
    "96 principal, int8": Case({"code": "int8", "width": 96} | TURNED),
    "96 principal, int8, own": Case({"code": "int8", "width": 96} | TURNED, own=True),
    "first 192, binary": Case({"code": "binary", "width": 192}),
    "192 principal, pq, 48 bytes": Case({"code": "pq", "width": 192, "bytes": 48} | TURNED),
}


def main() -> int:
    arguments = options(CLAIM, threads=1)
    torch.set_num_threads(arguments.threads)
    limit = 60 if arguments.quick else None
    task = DocsRetrieval.parse({"limit": limit} if limit else {})
    pairs = task.pairs()
    encoder = taut.vectors("minilm")
    queries, passages = (encoder.encode(pairs.column(side)) for side in (0, 1))
    texts = data.hashed(data.paragraphs("python_docstrings").rows)[: 300 if arguments.quick else CALIBRATION]
    known = encoder.encode([row[0] for row in texts])

    count = 2_000 if arguments.quick else DOCUMENTS
    generator = torch.Generator().manual_seed(0)
    many = F.normalize(torch.randn(count, encoder.width, generator=generator), dim=1)
    asked = F.normalize(torch.randn(QUERIES, encoder.width, generator=generator), dim=1)

    found, timed = {}, {}
    for name, case in CASES.items():
        index = Index.build(passages, calibration=None if case.own else known, **case.build)
        found[name] = index, found_reciprocals(index, queries, case.ask)
        if not case.own:
            timed[name] = Index.build(many, calibration=many[:2_000], **case.build)
    speeds = {
        label: compare(
            {name: partial(index.search, some, DEPTH, **CASES[name].ask) for name, index in timed.items()},
            repeats=3 if arguments.quick else 15,
            warmup=1,
            threads=arguments.threads,
        )
        for label, some in (("one", asked[:1]), ("many", asked))
    }

    dense = found["float"][1]
    rows = []
    for name, (index, reciprocals) in found.items():
        case, change = CASES[name], paired_bootstrap(reciprocals, dense)
        row = {
            "vectors": name,
            "bytes": index.bytes_per_vector,
            "shared bytes": index.shared_bytes,
            f"MRR@{DEPTH}": sum(reciprocals) / len(reciprocals),
            f"recall@{DEPTH}": sum(value > 0 for value in reciprocals) / len(reciprocals),
            "change of MRR": Quantity(
                value=change.value, unit="", how="paired bootstrap over the sentences", low=change.low, high=change.high
            ),
        }
        if name in timed:
            row |= {f"time, {label} / float": ratio(speed[name], speed["float"]) for label, speed in speeds.items()}
        if case.most is not None and not arguments.quick:
            row |= {"may lose": case.most, "holds": change.value >= -case.most}
        rows.append(row)
    fast = ratio(speeds["one"]["float"], speeds["one"]["binary, Hamming"])
    faster = fast.low is not None and fast.low >= FASTER
    facts = ", ".join(f"{key} {value}" for key, value in pairs.facts().items())
    notes = (
        f"{facts}. Ranges, thresholds, codebooks and rotations are fitted on {len(texts)} docstring paragraphs, 'own' "
        f"on the passages. 'change': of the score itself; the interval says how sure it is. Time: the search for "
        f"{DEPTH} among {count:,} random vectors, for 1 query and for {QUERIES}, {arguments.threads} thread(s), one run"
    )
    passed = None if arguments.quick else faster and all(row.get("holds", True) for row in rows)
    return record("sentence_vectors", CLAIM, rows, passed, notes, arguments.quick)


def found_reciprocals(index: Index, queries: Tensor, ask: dict[str, Any]) -> list[float]:
    """1 / rank of each sentence's own passage among the first ``DEPTH``, else 0.

    From every score, so that ties count against the passage; where candidates are scored again, from the search.
    """
    if "candidates" not in ask:
        return reciprocal(ranks_of_own(index.scores(queries, **ask).double()))
    own = index.search(queries, DEPTH, **ask).ids == torch.arange(len(queries))[:, None]
    return (own.double() / torch.arange(1, own.shape[1] + 1)).sum(1).tolist()


if __name__ == "__main__":
    raise SystemExit(main())
