"""Linear maps with 8-bit weights and inputs against torch's dense fp32 map."""

import torch
from harness import against, options, record
from torch import nn

from taut.core.site import LinearSite
from taut.measurement.clock import compare
from taut.methods.base import Calibration
from taut.methods.linear.low_bit.method import LowBitLinear

CLAIM = "linear.low_bit int8: faster than dense fp32 at 1, 16 and 512 tokens"
SHAPES = [(384, 1536), (768, 3072), (1024, 4096), (2048, 8192)]


def int8(dense: nn.Linear) -> nn.Module:
    """The part a recipe would install for this map, fitted to its weight."""
    site = LinearSite(slot="feedforward", path="map", inputs=dense.in_features, outputs=dense.out_features, bias=True)
    method = LowBitLinear.parse({})
    part = method.build(site, torch.device("cpu"), torch.float32)
    method.fit(part, dense.weight, Calibration())
    part.bias = dense.bias
    return part


@torch.inference_mode()
def main() -> int:
    arguments = options(CLAIM, repeats=30)
    torch.manual_seed(0)
    rows = []
    for narrow, wide in SHAPES[:2] if arguments.quick else SHAPES:
        for inputs, outputs in ((narrow, wide), (wide, narrow)):
            dense = nn.Linear(inputs, outputs)
            part = int8(dense)
            for tokens in (1, 16, 512):
                x = torch.randn(1, tokens, inputs)
                cases = {"dense": lambda x=x, dense=dense: dense(x), "int8": lambda x=x, part=part: part(x)}
                for threads in (1, 2):
                    times = compare(cases, repeats=6 if arguments.quick else arguments.repeats, threads=threads)
                    where = {"inputs": inputs, "outputs": outputs, "tokens": tokens, "threads": threads}
                    rows.append(against(times["dense"], times["int8"], 1.0, **where))
    notes = "dense: torch F.linear (oneDNN or MKL). 'holds': the whole 95 % interval of the speed-up is above 1"
    return record(
        "int8_linear", CLAIM, rows, all(row["holds"] for row in rows if "holds" in row), notes, arguments.quick
    )


if __name__ == "__main__":
    raise SystemExit(main())
