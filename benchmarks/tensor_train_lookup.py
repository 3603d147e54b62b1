"""Looking up 8192 Zipf-distributed ids in a tensor-train table against torch's dense lookup and tltorch's."""

from collections.abc import Callable

import torch
from harness import against, options, peer, record
from torch import Tensor
from torch.nn import functional as F

from taut.core.site import TableSite
from taut.measurement.clock import compare
from taut.methods.embedding.tensor_train.method import TensorTrainEmbedding, TensorTrainTable

ROWS, WIDTH, TOKENS = 50_000, 768, 8192
RANKS, PROMISED = (8, 16, 32, 64), 16
TIME, AGAINST_PEER = 5.0, 5.0
CLAIM = (
    f"embedding.tensor_train: {TOKENS} Zipf-distributed ids in 50k x 768 at rank {PROMISED} take at most {TIME:g}x the "
    f"time of dense fp32, and tltorch's FactorizedEmbedding at least {AGAINST_PEER:g}x ours"
)


def zipf(count: int, tokens: int, device: str) -> dict[str, Tensor]:
    """Ids with probability 1 / rank: by rank, as tokenizers roughly number them, and with the numbering shuffled."""
    shares = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    by_rank = torch.multinomial(shares, tokens, replacement=True)
    return {"by rank": by_rank.to(device), "shuffled": torch.randperm(count)[by_rank].to(device)}


def train(rank: int, device: str) -> TensorTrainTable:
    site = TableSite(slot="embedding", path="embedding", rows=ROWS, width=WIDTH)
    return TensorTrainEmbedding.parse({"rank": rank}).build(site, torch.device(device), torch.float32)


def theirs(rank: int, device: str) -> Callable[[Tensor], Tensor]:
    """tltorch's table of the same kind and rank. Its rows must multiply out exactly, and those of 50,000 do."""
    peer("tensorly", "tensorly-torch")
    import tltorch

    return tltorch.FactorizedEmbedding(
        ROWS, WIDTH, factorization="blocktt", rank=rank, n_tensorized_modes=3, device=torch.device(device)
    )


def main() -> int:
    arguments = options(CLAIM, repeats=20)
    torch.manual_seed(0)
    repeats = 5 if arguments.quick else arguments.repeats
    dense = torch.randn(ROWS, WIDTH, device=arguments.device)
    tables = {f"rank {rank}": train(rank, arguments.device) for rank in RANKS}
    lookups = tables | {"dense": lambda ids: F.embedding(ids, dense), "tltorch": theirs(PROMISED, arguments.device)}
    rows = []
    for numbering, ids in zipf(ROWS, TOKENS, arguments.device).items():
        where = {"ids": numbering, "distinct": len(ids.unique())}

        def inference(table: Callable[[Tensor], Tensor], ids: Tensor = ids) -> Tensor:
            with torch.inference_mode():
                return table(ids)

        cases = {name: lambda table=table: inference(table) for name, table in lookups.items()}
        times = compare(
            cases, repeats=repeats, threads=1 if arguments.device == "cpu" else None, device=arguments.device
        )
        for rank in RANKS:
            target = 1 / TIME if rank == PROMISED and arguments.device == "cpu" else None
            row = against(times["dense"], times[f"rank {rank}"], target, **where, rank=rank, against="dense")
            rows.append(row)
        target = AGAINST_PEER if arguments.device == "cpu" else None
        rows.append(against(times["tltorch"], times["rank 16"], target, **where, rank=PROMISED, against="tltorch"))

    trained = dense.clone().requires_grad_()

    def learn(table: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> None:
        torch.autograd.grad(table(ids).sum(), parameters)

    cases = {"dense": lambda: learn(lambda ids: F.embedding(ids, trained), [trained])}
    for rank in RANKS:
        table = tables[f"rank {rank}"]
        cases[f"rank {rank}"] = lambda table=table: learn(table, list(table.parameters()))
    times = compare(cases, repeats=repeats, threads=1 if arguments.device == "cpu" else None, device=arguments.device)
    for rank in RANKS:
        facts = {"ids": "shuffled", "rank": rank, "against": "dense, forward and backward"}
        rows.append(against(times["dense"], times[f"rank {rank}"], **facts))
    numbers = tables[f"rank {PROMISED}"].numbers()
    notes = (
        "one thread; 'faster': how many times faster than what it is held against; 'holds': the whole 95 % interval "
        f"reaches the target. A table of rank {PROMISED} holds {numbers:,} numbers for {ROWS * WIDTH:,}"
    )
    return record(
        "tensor_train_lookup",
        CLAIM,
        rows,
        all(row.get("holds", True) for row in rows),
        notes,
        arguments.quick,
        arguments.device,
    )


if __name__ == "__main__":
    raise SystemExit(main())
