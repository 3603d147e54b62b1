"""Looking up 8192 token vectors in a table of vector codes against torch's dense lookup, and the tied head."""

from collections.abc import Callable

import torch
from harness import against, options, record
from torch import Tensor
from torch.nn import functional as F

from taut.core.site import TableSite
from taut.measurement.clock import compare
from taut.methods.embedding.product_quantized import ProductQuantizedEmbedding, ProductTable

TIME = 1.5
CLAIM = f"embedding.product_quantized: 8192 uniform ids in 50k x 768 take at most {TIME}x the time of dense fp32"
EIGHT_BITS = {"method": "low_bit", "bits": 8}
TABLES = {
    "4 wide": {"subvector": 4},
    "8 wide": {"subvector": 8},
    "16 wide": {"subvector": 16},
    "8 wide, codebooks int8": {"subvector": 8, "store": EIGHT_BITS},
    "4 wide, 4-bit codes": {"subvector": 4, "centroids": 16},
    "8 wide, 2 stages": {"subvector": 8, "stages": 2},
}
PROMISED = ("4 wide", "8 wide")


def parts(rows: int, width: int, device: str) -> dict[str, ProductTable]:
    """Tables with random codes: what they say does not change how long it takes."""
    site = TableSite(slot="embedding", path="embedding", rows=rows, width=width, heads=("head",))
    return {
        name: ProductQuantizedEmbedding.parse(knobs).build(site, torch.device("cpu"), torch.float32).to(device)
        for name, knobs in TABLES.items()
    }


def _backward(vectors: Tensor, direction: Tensor) -> Tensor:
    vectors.backward(direction)
    return vectors


def main() -> int:
    arguments = options(CLAIM, repeats=30)
    torch.manual_seed(0)
    repeats = 6 if arguments.quick else arguments.repeats
    rows = []

    def add(what: str, shape: str, tokens: int, cases: dict[str, Callable[[], Tensor]], promised: bool) -> None:
        for threads in (1, 2) if arguments.device == "cpu" else (1,):
            times = compare(cases, repeats=repeats, threads=threads, device=arguments.device)
            for name in TABLES:
                where = {"what": what, "table": shape, "format": name, "tokens": tokens, "threads": threads}
                target = 1 / TIME if promised and name in PROMISED and threads == 1 else None
                rows.append(against(times["dense"], times[name], target, **where))

    count, width = 50_000, 768
    dense = torch.randn(count, width, device=arguments.device)
    tables = parts(count, width, arguments.device)
    for tokens in (512, 8192):
        ids = torch.randint(count, (tokens,), device=arguments.device)
        with torch.inference_mode():
            cases = {name: lambda part=part, ids=ids: part(ids) for name, part in tables.items()}
            cases["dense"] = lambda ids=ids: F.embedding(ids, dense)
            add("lookup", f"{count} x {width}", tokens, cases, tokens == 8192)
    direction, learned = torch.randn(8192, width, device=arguments.device), dense.clone().requires_grad_()
    for part in tables.values():
        part.unpack()
    # A dense table's gradient is as large as itself.
    cases = {name: lambda part=part, ids=ids: _backward(part(ids), direction) for name, part in tables.items()}
    cases["dense"] = lambda ids=ids: _backward(F.embedding(ids, learned), direction)
    add("lookup and backward", f"{count} x {width}", 8192, cases, False)

    for count, width in ((30_000, 384),) if arguments.quick else ((30_000, 384), (50_000, 768)):
        dense = torch.randn(count, width, device=arguments.device)
        tables = parts(count, width, arguments.device)
        for tokens in (1, 16, 64, 256):
            hidden = torch.randn(tokens, width, device=arguments.device)
            with torch.inference_mode():
                cases = {name: lambda part=part, hidden=hidden: part.logits(hidden) for name, part in tables.items()}
                cases["dense"] = lambda hidden=hidden, dense=dense: F.linear(hidden, dense)
                add("tied head", f"{count} x {width}", tokens, cases, False)

    notes = "'holds': the whole 95 % interval is at or above 1 / 1.5. Lengths kept apart. No promise for the other rows"
    passed = all(row.get("holds", True) for row in rows)
    return record("vector_code_lookup", CLAIM, rows, passed, notes, arguments.quick, arguments.device)


if __name__ == "__main__":
    raise SystemExit(main())
