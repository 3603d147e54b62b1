"""Low-bit maps of every number format for the tests, and inputs to calibrate them on."""

import torch
from torch import Tensor

from taut.core.site import LinearSite
from taut.methods.base import Calibration
from taut.methods.linear.low_bit.method import LowBitLinear, LowBitLinearPart

CPU = torch.device("cpu")
SHAPES = [(64, 48), (33, 7), (5, 130), (256, 1024)]
GROUPED = [
    *({"activations": "float"}, {"bits": 8, "group": 24}, {"bits": 4}, {"bits": 4, "group": 10, "symmetric": True}),
    *({"bits": 6, "group": 16}, {"bits": 3, "group": 12, "clip": True}, {"bits": 2, "group": 16, "clip": True}),
    *({"bits": 4, "number": number} for number in ("nf4", "mxfp4")),
    {"bits": 4, "number": "fp4", "clip": True},
]
INTEGER = [{}, {"activations": "static"}]
ROUNDED = [*INTEGER, {"bits": 4, "activations": "fp8"}, {"activations": "fp4"}]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def line(outputs: int, inputs: int, bias: bool = True, dtype: str = "float32") -> LinearSite:
    return LinearSite(slot="feedforward", path="a.b", dtype=dtype, inputs=inputs, outputs=outputs, bias=bias)


def seen(inputs: int, tokens: int = 400, seed: int = 3) -> Calibration:
    """What correlated inputs of very unequal size show."""
    x = normal(tokens, inputs, seed=seed) @ normal(inputs, inputs, seed=seed + 1) * torch.logspace(-1, 0.5, inputs)
    return Calibration(gram=(x.T @ x).double() / tokens, least=x.amin(0), greatest=x.amax(0))


def fitted(outputs: int, inputs: int, calibration: Calibration | None = None, **knobs) -> LowBitLinearPart:
    method, far = LowBitLinear.parse(knobs), torch.full((inputs,), 4.0)
    part = method.build(line(outputs, inputs), CPU, torch.float32)
    method.fit(part, start(outputs, inputs), calibration or Calibration(least=-far, greatest=far))
    part.bias.data.copy_(normal(outputs, seed=1))
    return part


def start(outputs: int, inputs: int) -> Tensor:
    return normal(outputs, inputs) * inputs**-0.5
