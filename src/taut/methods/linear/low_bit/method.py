"""A linear map in 8, 6, 4, 3 or 2 bits a weight; inputs rounded to 8 bits for an integer product, or exact."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import LinearSite, Site
from taut.methods.base import Calibration, Knobs, LinearMethod
from taut.methods.linear.low_bit.codes import GroupScales, MapCodes, OutputScales, straight_through
from taut.methods.linear.low_bit.float_activations import FloatGrid
from taut.methods.linear.low_bit.gptq import compensate
from taut.methods.part import LinearPart
from taut.ops.quantization.formats import BITS, number_format
from taut.ops.quantization.grouped_linear import GroupFormat

GRIDS = {"fp8": FloatGrid(3, 4), "fp4": FloatGrid(2, 1, cut=True)}
"""The formats of short floats. E3M4 had half the error of E4M3 on the inputs of a sentence encoder's maps."""
WHOLE_BYTES = 8
"""Codes of any number of bits fill whole bytes when this divides the size of a group."""
ROUNDING = {"float": 0.0, "int8": 0.03, "static": 0.1, "fp8": 0.1, "fp4": 0.4}
"""Tolerated relative error of an output against exact inputs, for inputs slightly beyond the calibrated range."""
GROUP = {8: 256, 6: 64, 4: 64, 3: 64, 2: 64}
"""By bits: how many outputs share a scale when neither the knobs nor the format set it."""
COMPENSATED_BITS = 4
"""With this many bits or fewer, rounding is compensated unless the knobs say otherwise."""
USUAL_RANGE = 6.0
"""Assumed largest input of a map built from scratch, without calibration: six standard deviations."""


class LowBitKnobs(Knobs):
    bits: Literal[8, 6, 4, 3, 2] = Field(8, description="bits of a weight")
    number: Literal["int", "nf4", "fp4", "mxfp4"] = Field(
        "int", description="how a weight is rounded: an integer, or with bits: 4 one of these floats"
    )
    activations: Literal["int8", "static", "float", "fp8", "fp4"] | None = Field(
        None,
        description="how inputs are rounded. int8: each token with its own range; static: all tokens with one range "
        "from calibration; both are for an integer product with 8-bit weights. float: not at all. fp8, fp4: to short "
        "floats with an exponent bias for each input from calibration, simulated. Default: int8 for 8-bit integers "
        "without group and clip, else float",
    )
    group: int | None = Field(
        None,
        ge=2,
        description="how many outputs share a scale at each input, when inputs are not integers; default: about 256 "
        "with 8 bits, 32 for mxfp4 (by definition), else about 64",
    )
    symmetric: bool = Field(
        False, description="centre the range of each group of integers on zero; floats and integer products always do"
    )
    clip: bool = Field(
        False, description="search each group's scale for the least squared error (for fp4 the search of LLM-FP4)"
    )
    compensate: bool | None = Field(
        None,
        description="GPTQ: later weights make up for the rounding error of earlier ones on calibration inputs, if "
        "there are any; default: with 4 bits and fewer",
    )


class LowBitLinearPart(LinearPart):
    """``weight`` is int8, with one dimension for integer products and three for groups (see codes.py).

    ``input_range`` uint8 holds the ranges of the inputs from calibration, where ``activations`` need them; else None.
    While packed, only the bias is trainable, and gradients pass through to the input. Between ``unpack`` and
    ``repack``, ``weight_unpacked`` (outputs, inputs) float32 is trainable too; codes are chosen from it under the
    present scales.
    """

    def __init__(self, site: LinearSite, codes: MapCodes, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(site, device, dtype)
        self.codes = codes
        # int8 rather than uint8: T5 casts its hidden states to the dtype of this weight unless that is int8.
        self.register_buffer("weight", torch.empty(codes.shape, dtype=torch.int8, device=device))
        input_range = torch.empty(codes.input_bytes, dtype=torch.uint8, device=device) if codes.input_bytes else None
        self.register_buffer("input_range", input_range)
        self.register_parameter("weight_unpacked", None)

    def product(self, x: Tensor) -> Tensor:
        """Apply the map, bias included: (..., inputs) -> (..., outputs), in the dtype of ``x``."""
        if self.weight_unpacked is None:
            return self.codes.linear(x, self.weight, self.input_range, self.bias)
        inputs = straight_through(x, self.codes.rounded(x, self.input_range))
        return F.linear(inputs, self._rounded_unpacked().to(x.dtype), self.bias)

    def merged(self) -> Tensor:
        """Return the dense weight, (outputs, inputs) float32."""
        return self.codes.expand(self.weight) if self.weight_unpacked is None else self._rounded_unpacked().detach()

    def numbers(self) -> int:
        """Return the dense count: each code stands for one parameter."""
        return self.out_features * self.in_features + (0 if self.bias is None else self.bias.numel())

    @torch.no_grad()
    def assign(self, weight: Tensor, gram: Tensor | None = None) -> None:
        """Choose scales and codes for ``weight``, (outputs, inputs) of any float dtype.

        With the inputs' ``gram`` matrix, rounding is compensated. Raises TautError for numbers that are not finite or
        too large for a scale.
        """
        self.weight.copy_(self.codes.pack(weight))
        if gram is not None:
            target = compensate(weight, gram, self.codes.rounder(self.weight))
            self.weight.copy_(self.codes.repack(target, self.weight))

    @torch.no_grad()
    def expect(self, least: Tensor, greatest: Tensor) -> None:
        """Store the range of each input, (inputs,) each; only for activations that need ranges."""
        self.input_range.copy_(self.codes.learn_inputs(least, greatest))

    def unpack(self, original: Tensor | None = None) -> None:
        """Make the weight trainable, in float32.

        It starts at ``original`` if rounding that to nearest gives the codes, else at the codes themselves: compensated
        codes are a better start than the weight they were made from.
        """
        super().unpack(original)
        start = self.codes.expand(self.weight)
        if original is not None:
            dense = original.detach().to(self.weight.device, torch.float32)
            if torch.equal(self.codes.repack(dense, self.weight), self.weight):
                start = dense.clone()
        self.weight_unpacked = nn.Parameter(start)

    @torch.no_grad()
    def repack(self) -> None:
        super().repack()
        if self.weight_unpacked is not None:
            self._check_unpacked()
            self.weight.copy_(self.codes.repack(self.weight_unpacked, self.weight))
            self.weight_unpacked = None

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.codes}"

    def _rounded_unpacked(self) -> Tensor:
        """Return ``weight_unpacked`` as it will be once repacked. For the gradient the rounding is the identity."""
        with torch.no_grad():
            packed = self.codes.expand(self.codes.repack(self.weight_unpacked, self.weight))
        return straight_through(self.weight_unpacked, packed)

    def _check_unpacked(self) -> None:
        if not self.weight_unpacked.isfinite().all():
            raise TautError("the trained weight holds numbers that are not finite, so it cannot be stored in few bits")


class LowBitLinear(LinearMethod):
    """Rounds weights, with scales for single outputs or for groups of outputs. ``keep`` counts stored bytes."""

    id = "linear.low_bit"
    summary = "2 to 8 bits a weight: int8 with rounded inputs for an integer product, or groups with exact inputs"
    source = (
        "int8: Dettmers et al. 2022, LLM.int8() (arXiv 2208.07339), vector-wise quantisation; compensated rounding: "
        "Frantar et al. 2022, GPTQ (arXiv 2210.17323); nf4: Dettmers et al. 2023, QLoRA (arXiv 2305.14314); fp4 and "
        "the short floats of activations: Liu et al. 2023, LLM-FP4 (arXiv 2310.16836); mxfp4: OCP Microscaling "
        "Formats 1.0. Changed: inputs are rounded between their own least and greatest value (asymmetric), without a "
        "second product for outlier columns; groups lie along the outputs, so no two inputs share a scale; GPTQ takes "
        "columns by falling energy, with scales chosen beforehand; activations' exponent biases come from their maxima"
    )
    Knobs = LowBitKnobs
    dial = "bits"
    uncounted = "PyTorch's counter does not count the products with codes (aten::_int_mm, FBGEMM's weighted bags)"

    @property
    def activations(self) -> str:
        knobs = self.knobs
        plain = knobs.bits == 8 and knobs.number == "int" and not knobs.group and not knobs.clip
        return knobs.activations or ("int8" if plain else "float")

    @property
    def approximate(self) -> float:
        return ROUNDING[self.activations]

    @property
    def needs(self) -> frozenset[str]:
        compensated = self.knobs.bits <= COMPENSATED_BITS if self.knobs.compensate is None else self.knobs.compensate
        ranges = {"least", "greatest"} if self.activations in ("static", *GRIDS) else set()
        return frozenset(ranges | {"gram"} if compensated else ranges)

    def fits(self, site: Site) -> str | None:
        knobs = self.knobs
        if not isinstance(site, LinearSite):
            return f"{site.name} is not a linear map"
        if knobs.bits not in BITS[knobs.number]:
            return f"number: {knobs.number} needs bits: {BITS[knobs.number][0]}, not {knobs.bits}"
        form = number_format(knobs.number, knobs.bits)
        if self._integer_product:
            if knobs.bits != 8:
                return f"activations: {knobs.activations} needs bits: 8, not {knobs.bits}; use float"
            if knobs.group or knobs.clip:
                return f"activations: {self.activations} has one scale per output; drop group and clip, or use float"
        if knobs.symmetric and knobs.number != "int":
            return f"number: {knobs.number} is centred on zero by itself; drop symmetric"
        if knobs.group and form.fixed_group and knobs.group != form.usual_group:
            return f"number: {knobs.number} has groups of {form.usual_group} by definition, not {knobs.group}"
        if (knobs.group or 0) > site.outputs:
            return f"group {knobs.group} is more than the {site.outputs} outputs of {site.name}"
        return None

    def solve(self, site: LinearSite, keep: float) -> "LowBitLinear":
        """Choose the most bits whose bytes, scales included, are at most ``keep`` of the dense map's.

        Raises TautError when no number of bits is that small.
        """
        share, reason = None, None
        for bits in BITS[self.knobs.number]:
            method = type(self)(self.knobs.model_copy(update={"bits": bits}))
            reason = method.fits(site) or reason
            if method.fits(site) is None:
                share = method.predict(site).bytes / site.dense().bytes
                if share <= keep:
                    return method
        why = f"the least is {share:.4g}" if share is not None else reason
        raise TautError(f"{self.id}: keep = {keep} is too little at {site.name}: {why}")

    def predict(self, site: LinearSite) -> Cost:
        dense, codes = site.dense(), self._codes(site)
        bias = site.outputs * site.width_in_bytes if site.bias else 0
        stored = torch.Size(codes.shape).numel() + codes.input_bytes + bias
        return Cost(dense.parameters, stored, dense.flops_per_token)

    def build(self, site: LinearSite, device: torch.device, dtype: torch.dtype) -> LowBitLinearPart:
        part = LowBitLinearPart(site, self._codes(site), device, dtype)
        if not part.weight.is_meta:
            part.assign(torch.randn(site.outputs, site.inputs, device=device) * site.inputs**-0.5)
            if part.input_range is not None:
                usual = torch.full((site.inputs,), USUAL_RANGE, device=device)
                part.expect(-usual, usual)
        return part

    @torch.no_grad()
    def fit(self, part: LowBitLinearPart, weight: Tensor, calibration: Calibration) -> None:
        """Round the weight. Without ``calibration.gram`` every weight is rounded to nearest.

        Raises TautError when ``activations`` need the inputs' ranges and ``calibration`` lacks them.
        """
        part.assign(weight, calibration.gram if "gram" in self.needs else None)
        if part.input_range is not None:
            if calibration.least is None or calibration.greatest is None:
                raise TautError(
                    f"{self.id}: activations: {self.activations} needs the inputs' ranges; give calibration text, or "
                    "use int8 or float"
                )
            part.expect(calibration.least, calibration.greatest)

    @property
    def _integer_product(self) -> bool:
        return self.activations in ("int8", "static")

    def _codes(self, site: LinearSite) -> MapCodes:
        knobs = self.knobs
        if self._integer_product:
            return OutputScales(site.outputs, site.inputs, fixed=self.activations == "static")
        form = GroupFormat(site.outputs, site.inputs, knobs.bits, self._group(site.outputs), knobs.number)
        return GroupScales(form, knobs.symmetric, knobs.clip, GRIDS.get(self.activations))

    def _group(self, outputs: int) -> int:
        """Return how many outputs share a scale.

        The knobs or the format set it; else it is the usual number, or a little less so that no group is half empty.
        """
        form = number_format(self.knobs.number, self.knobs.bits)
        if self.knobs.group or form.fixed_group:
            return min(self.knobs.group or form.usual_group, outputs)
        blocks = -(-outputs // GROUP[self.knobs.bits])
        return min(-(-outputs // blocks // WHOLE_BYTES) * WHOLE_BYTES, outputs)
