"""Round inputs to short floats with an exponent bias for each input: the activations of LLM-FP4.

A float has E exponent bits, M mantissa bits and a real exponent bias b. The largest magnitude is
(2 - 2^-M) 2^(2^E - 1 - b). There are subnormal numbers, but no infinity and no NaN. All inputs of a channel j share the
bias rho + k_j, where k_j is a whole number in 0 ... 2^E - 1. Hence Q_{rho + k}(x) = 2^-k Q_rho(2^k x), exactly. So
hardware may shift the weights instead (the "pre-shifted exponent bias") and use one bias for the whole tensor. Here
this is simulated: numbers are rounded to such floats and multiplied as float32.

Source: Liu et al. 2023, LLM-FP4 (arXiv 2310.16836). Changed: the bias follows from each input's largest magnitude,
without a search on the layer's output; biases are rounded downwards unless ``cut`` is set; the shifts stay at the
inputs, so the weights are unchanged.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatGrid:
    """Floats with one sign bit, ``exponent`` E bits and ``mantissa`` M bits.

    With ``cut``, biases are rounded to nearest, as published. That may halve a channel's range and pays where steps are
    coarse. Without it they are rounded downwards.
    """

    exponent: int
    mantissa: int
    cut: bool = False

    @property
    def top(self) -> float:
        """The largest number at bias 0."""
        return (2 - 2.0**-self.mantissa) * 2.0 ** (2**self.exponent - 1)

    def stored_bytes(self, channels: int) -> int:
        """Count the bytes that ``learn`` returns: 2^rho in float32, and one byte for each channel's shift."""
        return 4 + channels

    def learn(self, largest: Tensor) -> Tensor:
        """Choose the biases: the largest magnitude of each channel, (N,) -> (``stored_bytes``,) uint8."""
        # A channel whose inputs were all zero gets the bias of the channel with the smallest positive maximum.
        quietest = torch.where(largest > 0, largest, torch.inf).min()
        largest = torch.where(largest > 0, largest, quietest if quietest.isfinite() else 1.0).double()
        biases = (self.top / largest).log2()
        shared = biases.min()
        shifts = biases.round() - shared.round() if self.cut else (biases - shared).floor()
        shifts = shifts.clamp(0, 2**self.exponent - 1)
        return torch.cat((shared.exp2().float().view(1).view(torch.uint8), shifts.to(torch.uint8)))

    def rounded(self, x: Tensor, stored: Tensor) -> Tensor:
        """Round (..., N) to the nearest number of each channel's format -> (..., N). Computed in float32 or float64. A
        NaN stays a NaN."""
        # Copied, because a view as floats needs an aligned start.
        shared, shifts = stored[:4].clone().view(torch.float32), stored[4:].int()
        scale = torch.ldexp(shared.expand(len(shifts)), shifts)
        numbers = x if x.dtype == torch.float64 else x.float()
        return (self.quantise(numbers * scale) / scale).to(x.dtype)

    def quantise(self, x: Tensor) -> Tensor:
        """Q_0: round float32 or float64 to the nearest number at bias 0. Ties go to the even mantissa."""
        x = x.clamp(-self.top, self.top)
        exponent = (torch.frexp(x).exponent - 1).clamp(min=1) - self.mantissa
        return torch.ldexp(torch.ldexp(x, -exponent).round(), exponent)
