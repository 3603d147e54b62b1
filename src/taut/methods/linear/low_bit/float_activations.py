"""Inputs rounded to short floats, with an exponent bias for each input: the activations of LLM-FP4.

A float of E exponent and M mantissa bits with a real exponent bias b holds +-(2 - 2^-M) 2^(2^E - 1 - b) at most, knows
no infinity and no NaN, and has subnormal numbers. Inputs of one channel j share a bias rho + k_j with a whole number
k_j in 0 ... 2^E - 1, so that Q_{rho + k}(x) = 2^-k Q_rho(2^k x), exactly: hardware may shift the weights instead (the
"pre-shifted exponent bias") and see one bias for the whole tensor. Here nothing runs in such floats: numbers are
rounded to them and multiplied as float32.

Source: Liu et al. 2023, LLM-FP4 (arXiv 2310.16836). Changed: the bias comes from each input's largest magnitude, with
no search on the layer's output; without ``cut`` no bias is rounded upwards; and as the shifts are at the inputs anyway,
the weights stay as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FloatGrid:
    """Floats of one sign, ``exponent`` E and ``mantissa`` M bits. ``cut``: biases are rounded to nearest, as published,
    which may halve what a channel can hold and pays where steps are coarse; else downwards."""

    exponent: int
    mantissa: int
    cut: bool = False

    @property
    def top(self) -> float:
        """The largest number at bias 0."""
        return (2 - 2.0**-self.mantissa) * 2.0 ** (2**self.exponent - 1)

    def stored_bytes(self, channels: int) -> int:
        """Of ``learn``: 2^rho in float32, and a byte for each channel's shift."""
        return 4 + channels

    def learn(self, largest: Tensor) -> Tensor:
        """The largest magnitude of each channel, (N,) -> (``stored_bytes``,) uint8."""
        # A channel that was never seen gets the bias of the quietest that was.
        quietest = torch.where(largest > 0, largest, torch.inf).min()
        largest = torch.where(largest > 0, largest, quietest if quietest.isfinite() else 1.0).double()
        biases = (self.top / largest).log2()
        shared = biases.min()
        shifts = biases.round() - shared.round() if self.cut else (biases - shared).floor()
        shifts = shifts.clamp(0, 2**self.exponent - 1)
        return torch.cat((shared.exp2().float().view(1).view(torch.uint8), shifts.to(torch.uint8)))

    def rounded(self, x: Tensor, stored: Tensor) -> Tensor:
        """(..., N) -> (..., N), each number the nearest that its channel can hold; computed in float32 at least. A NaN
        stays one."""
        # A copy, since a view as floats needs an aligned start.
        shared, shifts = stored[:4].clone().view(torch.float32), stored[4:].int()
        scale = torch.ldexp(shared.expand(len(shifts)), shifts)
        numbers = x if x.dtype == torch.float64 else x.float()
        return (self.quantise(numbers * scale) / scale).to(x.dtype)

    def quantise(self, x: Tensor) -> Tensor:
        """Q_0: the nearest number at bias 0, float32 or float64; of two equally near the one with the even mantissa."""
        x = x.clamp(-self.top, self.top)
        exponent = (torch.frexp(x).exponent - 1).clamp(min=1) - self.mantissa
        return torch.ldexp(torch.ldexp(x, -exponent).round(), exponent)
