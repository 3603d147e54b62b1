"""Linear maps in few bits against torch's dense fp32 map: time and bytes, setting by setting."""

from typing import Any

import torch
from harness import against, options, record
from torch import nn

from taut.core.site import LinearSite
from taut.measurement.clock import compare
from taut.methods.base import Calibration
from taut.methods.linear.low_bit.method import LowBitLinear, LowBitLinearPart

CLAIM = "linear.low_bit: int8 no slower than dense fp32 at 1 and 512 tokens, int4 no slower at 1, on one thread"
SHAPES = [(384, 1536), (1024, 4096), (2048, 2048)]
SETTINGS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "int8": ({}, (1, 512)),
    "int8 static": ({"activations": "static"}, (1, 512)),
    "int8, float inputs": ({"activations": "float"}, ()),
    "int4": ({"bits": 4}, (1,)),
    "int2": ({"bits": 2}, ()),
    "nf4": ({"bits": 4, "number": "nf4"}, ()),
}
"""Knobs, and the tokens for which the claim is made."""
TOKENS = (1, 16, 512)


def part_of(dense: nn.Linear, knobs: dict[str, Any]) -> tuple[LowBitLinearPart, float]:
    """The part that a recipe would install for this map, and its share of the dense bytes."""
    site = LinearSite(slot="feedforward", path="map", inputs=dense.in_features, outputs=dense.out_features, bias=True)
    method, far = LowBitLinear.parse(knobs), torch.full((dense.in_features,), 5.0)
    part = method.build(site, torch.device("cpu"), torch.float32)
    method.fit(part, dense.weight, Calibration(least=-far, greatest=far))
    part.bias = dense.bias
    return part, method.predict(site).bytes / site.dense().bytes


@torch.inference_mode()
def main() -> int:
    arguments = options(CLAIM, repeats=30)
    torch.manual_seed(0)
    rows = []
    for inputs, outputs in SHAPES[:1] if arguments.quick else SHAPES:
        dense = nn.Linear(inputs, outputs)
        parts = {name: part_of(dense, knobs) for name, (knobs, _) in SETTINGS.items()}
        for tokens in TOKENS:
            x = torch.randn(1, tokens, inputs)
            cases = {"dense": lambda x=x, dense=dense: dense(x)}
            cases |= {name: lambda x=x, part=part: part(x) for name, (part, _) in parts.items()}
            for threads in (1, 2):
                times = compare(cases, repeats=6 if arguments.quick else arguments.repeats, threads=threads)
                for name, (_, share) in parts.items():
                    promised = threads == 1 and tokens in SETTINGS[name][1]
                    where = {"inputs": inputs, "outputs": outputs, "tokens": tokens, "threads": threads}
                    target = 1.0 if promised else None
                    rows.append(
                        {"setting": name, "bytes": share} | against(times["dense"], times[name], target, **where)
                    )
    notes = (
        "dense: torch F.linear (oneDNN or MKL). 'bytes': share of the dense map's. 'holds': the whole 95 % interval of "
        "the speed-up is above 1; rows without it are no promise. All maps stay in the cache from call to call, which "
        "favours the dense one"
    )
    return record(
        "low_bit_linear", CLAIM, rows, all(row["holds"] for row in rows if "holds" in row), notes, arguments.quick
    )


if __name__ == "__main__":
    raise SystemExit(main())
