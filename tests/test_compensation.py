"""Rounding to low-bit maps that makes up for its errors, and the numbers that eight and four bits can hold."""

import pytest
import torch
from low_bit_maps import GROUPED, fitted, normal, seen, start
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError
from taut.methods.base import Calibration
from taut.methods.linear.low_bit import gptq
from taut.methods.linear.low_bit.float_activations import FloatGrid
from taut.methods.linear.low_bit.method import GRIDS, LowBitLinearPart


def slow_compensation(weight: Tensor, gram: Tensor, rounded) -> Tensor:
    """Optimal Brain Quantization in a fixed order, the inverse downdated column by column (GPTQ, equations 2 and 3)."""
    numbers, damped = weight.double().clone(), gram + gptq.DAMPING * gram.diagonal().mean() * torch.eye(len(gram))
    inverse = torch.linalg.inv(damped)
    left = list(range(len(gram)))
    for index in gram.diagonal().argsort(descending=True, stable=True).tolist():
        left.remove(index)
        error = (numbers[:, index] - rounded(numbers[:, index], index)) / inverse[index, index]
        numbers[:, left] -= error[:, None] * inverse[index, left]
        inverse = inverse - inverse[:, index, None] * inverse[index] / inverse[index, index]
    return numbers


def calibrated_error(part: LowBitLinearPart, gram: Tensor) -> float:
    gap = (part.merged() - start(part.out_features, part.in_features)).double()
    return float(((gap @ gram) * gap).sum())


class TestCompensation:
    FORMATS = [{"compensate": True}, *({**knobs, "compensate": True} for knobs in GROUPED)]

    @pytest.mark.parametrize("inputs", [9, 150])
    def test_is_the_slow_formula(self, inputs: int) -> None:
        """Blocks and Cholesky factors change nothing: equal in float64, far beyond a rounding step."""
        weight, gram = normal(6, inputs, dtype=torch.float64), seen(inputs).gram
        fast = gptq.compensate(weight, gram, lambda column, index: (column * 8).round() / 8)
        slow = slow_compensation(weight, gram, lambda column, index: (column * 8).round() / 8)
        assert torch.allclose(fast, slow, atol=1e-8)
        assert not torch.allclose(fast, weight, atol=1e-3)

    @pytest.mark.parametrize("knobs", FORMATS, ids=str)
    def test_errs_less_on_what_calibration_showed(self, knobs: dict) -> None:
        calibration = seen(48)
        plain = calibrated_error(fitted(70, 48, calibration, **{**knobs, "compensate": False}), calibration.gram)
        part = fitted(70, 48, calibration, **knobs)
        assert calibrated_error(part, calibration.gram) < 0.9 * plain
        assert torch.equal(part.weight, fitted(70, 48, calibration, **knobs).weight)

    def test_few_tokens_and_none(self) -> None:
        """A singular Gram matrix, an input never seen, and nothing seen at all."""
        x = normal(7, 48)
        x[:, 5] = 0
        calibration = Calibration(gram=(x.T @ x).double() / 7)
        part, plain = fitted(70, 48, calibration, bits=4), fitted(70, 48, bits=4)
        assert part.merged().isfinite().all()
        assert calibrated_error(part, calibration.gram) < 0.5 * calibrated_error(plain, calibration.gram)
        nothing = Calibration(gram=torch.zeros(48, 48, dtype=torch.float64))
        assert torch.equal(fitted(70, 48, nothing, bits=4).weight, plain.weight)
        assert torch.equal(fitted(70, 48, calibration, bits=4, compensate=False).weight, plain.weight)

    def test_wrong_input(self) -> None:
        with pytest.raises(TautError, match=r"a map of 48 inputs needs \(48, 48\)"):
            fitted(70, 48, seen(47), bits=4)
        with pytest.raises(TautError, match="not finite"):
            fitted(70, 48, Calibration(gram=torch.full((48, 48), torch.nan)), bits=4)


class TestFloatGrid:
    def test_the_numbers_of_e2m1_and_e4m3(self) -> None:
        ladder = torch.linspace(-13, 13, 5201, dtype=torch.float64)
        numbers = FloatGrid(2, 1).quantise(ladder).unique().tolist()
        assert numbers == [-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12]
        grid = FloatGrid(4, 3)
        assert grid.top == 1.875 * 2**15
        finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        finite = finite[finite.isfinite() & (finite.abs() < 256)]
        # Their bias is 7, and from 256 on their top exponent is short of one number.
        assert torch.equal(grid.quantise(finite * 2**7), finite * 2**7)
        near = normal(10_000, seed=2) * 10
        assert torch.equal(grid.quantise(near * 2**7) / 2**7, near.to(torch.float8_e4m3fn).float())

    @pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
    def test_a_shift_of_the_bias_is_a_power_of_two(self, grid: FloatGrid) -> None:
        """Q_{rho + k}(x) = 2^-k Q_rho(2^k x), to the bit, by the formula of the paper with a real bias."""
        x, rho = normal(100_000) * 3, 0.37
        for shift in range(2**grid.exponent):
            stored = torch.cat((torch.tensor([2.0**rho]).view(torch.uint8), torch.tensor([shift], dtype=torch.uint8)))
            none = torch.cat((torch.tensor([2.0**rho]).view(torch.uint8), torch.tensor([0], dtype=torch.uint8)))
            shifted = grid.rounded(x[:, None], stored)
            assert torch.equal(shifted, grid.rounded(x[:, None] * 2**shift, none) / 2**shift)
        exact = x.double()[:1000]
        bias = rho + shift
        top = (2 - 2.0**-grid.mantissa) * 2 ** (2**grid.exponent - 1 - bias)
        exponent = (exact.clamp(-top, top).abs().log2() + bias).floor().clamp(min=1)
        step = 2 ** (exponent - grid.mantissa - bias)
        expected = ((exact.clamp(-top, top) / step).round() * step).clamp(-top, top)
        assert torch.allclose(shifted[:1000, 0].double(), expected, rtol=1e-6)

    @pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
    def test_biases_come_from_the_largest(self, grid: FloatGrid) -> None:
        largest = torch.tensor([3.0, 0.5, 0.01, 1e-8, 0.0])
        stored = grid.learn(largest)
        assert stored.numel() == grid.stored_bytes(5)
        shifts = stored[4:].tolist()
        assert shifts[0] == 0
        assert shifts == sorted(shifts)
        assert shifts[3] == shifts[4] == 2**grid.exponent - 1
        x = torch.stack((largest, -largest))
        back = grid.rounded(x, stored)
        # A bias rounded upwards may halve what a channel can hold, no more.
        assert ((back - x).abs()[:, :2] <= (0.5 if grid.cut else 0.05) * largest[:2]).all()
        assert torch.allclose(back[:, 0], x[:, 0])
        assert grid.rounded(torch.full((1, 5), torch.nan), stored).isnan().all()
        assert (grid.learn(torch.zeros(3))[4:] == 0).all()

    @pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
    def test_shifts_may_lie_in_the_weights(self, grid: FloatGrid) -> None:
        """The paper folds 2^-k into the weights and gives all inputs one bias: the same product."""
        calibration = seen(48)
        stored = grid.learn(torch.maximum(-calibration.least, calibration.greatest))
        shifts, weight, x = stored[4:].double(), normal(20, 48, dtype=torch.float64), normal(9, 48, dtype=torch.float64)
        ours = grid.rounded(x, stored) @ weight.T
        alone = torch.cat((stored[:4], torch.zeros_like(stored[4:])))
        assert torch.allclose(ours, grid.rounded(x * 2**shifts, alone) @ (weight * 2**-shifts).T, rtol=1e-12)

    @pytest.mark.parametrize(("activations", "error"), [("fp8", 0.03), ("fp4", 0.3)])
    def test_a_map_on_rounded_inputs(self, activations: str, error: float) -> None:
        calibration = seen(48)
        part = fitted(70, 48, calibration, activations=activations)
        scale = torch.maximum(-calibration.least, calibration.greatest) / 3
        x = (normal(30, 48, seed=8) * scale).requires_grad_()
        rounded = part.codes.rounded(x, part.input_range)
        expected = F.linear(rounded.double(), part.merged().double(), part.bias.double())
        assert torch.allclose(part(x).double(), expected, atol=1e-4)
        exact = F.linear(x, part.merged())
        assert 0.002 < (expected - part.bias - exact).norm() / exact.norm() < error
        (gradient,) = torch.autograd.grad(part(x).sum(), x)
        assert torch.allclose(gradient, part.merged().sum(0).expand_as(x), atol=1e-5)
