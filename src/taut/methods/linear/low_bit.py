"""A linear map with 8-bit weights; inputs are rounded to 8 bits on the fly, one token at a time."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import LinearSite, Site
from taut.kernels.int8_linear import expand, linear, pack, packed_size, unpack
from taut.methods.part import Calibration, Knobs, LinearMethod, LinearPart


class LowBitKnobs(Knobs):
    bits: Literal[8] = Field(8, description="bits of a weight")
    activations: Literal["int8", "float"] = Field(
        "int8", description="int8: inputs rounded token by token, an integer product; float: exact inputs, slow"
    )


class LowBitLinearPart(LinearPart):
    """``weight`` is one-dimensional int8: codes, scales and sums (see kernels.int8_linear). Only the bias is trainable;
    gradients pass through to the input."""

    def __init__(self, site: LinearSite, round_inputs: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(site, device, dtype)
        self.round_inputs = round_inputs
        size = packed_size(site.outputs, site.inputs)
        # int8 rather than uint8: T5 casts its hidden states to the dtype of this weight unless that is int8.
        self.register_buffer("weight", torch.empty(size, dtype=torch.int8, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs), in the dtype of ``x``."""
        return linear(x, self.weight, self.out_features, self.in_features, self.bias, self.round_inputs)

    def merged(self) -> Tensor:
        """(outputs, inputs) float32."""
        return expand(unpack(self.weight, self.out_features, self.in_features))

    def numbers(self) -> int:
        """The dense count: a code stands for a number."""
        return self.out_features * self.in_features + (0 if self.bias is None else self.bias.numel())

    def extra_repr(self) -> str:
        inputs = "int8" if self.round_inputs else "float"
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, activations={inputs}"


class LowBitLinear(LinearMethod):
    """Weights rounded to nearest with a scale for each output. ``keep`` counts stored bytes."""

    id = "linear.low_bit"
    summary = "8-bit weights, a scale for each output; inputs rounded to 8 bits token by token for an integer product"
    source = (
        "Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339), vector-wise quantisation. Changed: inputs keep their own "
        "least and greatest value (asymmetric), and there is no second product for outlier columns"
    )
    Knobs = LowBitKnobs
    dial = "bits"
    uncounted = "PyTorch's counter does not know the integer product (aten::_int_mm)"

    @property
    def approximate(self) -> bool:
        return self.knobs.activations == "int8"

    def fits(self, site: Site) -> str | None:
        return None if isinstance(site, LinearSite) else f"{site.name} is not a linear map"

    def solve(self, site: LinearSite, keep: float) -> "LowBitLinear":
        """8 bits where their bytes, scales included, are at most ``keep`` of the dense map's."""
        share = self.predict(site).bytes / site.dense().bytes
        if share <= keep:
            return self
        raise TautError(f"{self.id}: keep = {keep} is too little at {site.name}: the least is {share:.4g}")

    def predict(self, site: LinearSite) -> Cost:
        dense = site.dense()
        bias = site.outputs * site.width_in_bytes if site.bias else 0
        return Cost(dense.parameters, packed_size(site.outputs, site.inputs) + bias, dense.flops_per_token)

    def build(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> LowBitLinearPart:
        part = LowBitLinearPart(site, self.approximate, device, dtype)
        if not part.weight.is_meta:
            start = torch.randn(site.outputs, site.inputs, device=device) * site.inputs**-0.5
            self.fit(part, start, Calibration())
        return part

    @torch.no_grad()
    def fit(self, part: LowBitLinearPart, weight: Tensor, calibration: Calibration) -> None:
        part.weight.copy_(pack(weight))
