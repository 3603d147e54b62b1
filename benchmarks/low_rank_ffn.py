"""A feed-forward block of low-rank maps against the dense block: time of one forward pass, fp32."""

from collections.abc import Callable

import torch
from harness import against, options, record
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.site import LinearSite
from taut.measurement.clock import compare
from taut.methods.linear.low_rank import LowRankLinear
from taut.methods.part import Calibration

KEEP, TARGET = 0.32, 2.6
CLAIM = (
    f"linear.low_rank at keep {KEEP}: at least {TARGET}x faster per FFN than dense (up, GELU, down; 4x wide), 1 thread"
)


def low_rank(dense: nn.Linear, role: str) -> nn.Module:
    """The part a recipe would install for this map, fitted to its weight."""
    site = LinearSite(
        slot="feedforward",
        path=role,
        layer=0,
        role=role,
        inputs=dense.in_features,
        outputs=dense.out_features,
        bias=True,
    )
    method = LowRankLinear.parse({}, KEEP).solve(site, KEEP)
    part = method.build(site, torch.device("cpu"), torch.float32)
    method.fit(part, dense.weight, Calibration())
    part.bias = dense.bias
    return part.to(dense.weight.device)


def block(up: nn.Module, down: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: down(F.gelu(up(x)))


@torch.inference_mode()
def main() -> int:
    given = options(CLAIM, repeats=30)
    torch.manual_seed(0)
    rows = []
    for width in (256,) if given.quick else (1024, 2048):
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        thin_up, thin_down = (low_rank(*pair).to(given.device) for pair in ((up, "up"), (down, "down")))
        up, down = up.to(given.device), down.to(given.device)
        for tokens in (1, 512):
            x = torch.randn(1, tokens, width, device=given.device)
            cases = {"dense": block(up, down, x), "low rank": block(thin_up, thin_down, x)}
            for threads in (1, 2) if given.device == "cpu" else (1,):
                times = compare(
                    cases, repeats=6 if given.quick else given.repeats, threads=threads, device=given.device
                )
                where = {"width": width, "rank": thin_up.weight.shape[0], "tokens": tokens, "threads": threads}
                # The promise is for one thread; two wait for each other whenever the machine does anything else.
                target = TARGET if threads == 1 else None
                rows.append(against(times["dense"], times["low rank"], target, **where))
    notes = "dense: torch F.linear (oneDNN or MKL). 'holds': the whole 95 % interval is at or above the target"
    return record("low_rank_ffn", CLAIM, rows, all(row["holds"] for row in rows if "holds" in row), notes, given.quick)


if __name__ == "__main__":
    raise SystemExit(main())
