"""Number formats against what their papers and specifications say."""

import math

import pytest
import torch
from torch import Tensor

from taut.core.errors import TautError
from taut.ops.quantization import rowwise
from taut.ops.quantization.formats import BITS, E2M1, FORMATS, NF4, NVFP4_TOP, nearest_codes, number_format
from taut.ops.quantization.rowwise import RowFormat

FLOATS = ["nf4", "fp4", "mxfp4", "nvfp4"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(numbers: Tensor, layout: RowFormat, symmetric: bool = False, clip: bool = False) -> Tensor:
    return rowwise.unpack(rowwise.pack(numbers, layout, symmetric, clip), layout)


def test_the_sixteen_codes_of_e2m1():
    """Sign, two bits of exponent with bias 1, one of mantissa, subnormal at exponent 0."""
    for code, value in enumerate(E2M1):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert value == (-1) ** sign * size
    assert math.copysign(1, E2M1[8]) == -1


def test_nf4_is_made_of_normal_quantiles():
    """Even steps of probability between .5 and .9677083 on either side of zero, over the largest quantile."""
    positive = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((positive, negative, torch.zeros(1, dtype=torch.float64))).sort().values / positive.max()
    assert torch.allclose(levels, torch.tensor(NF4, dtype=torch.float64), atol=2e-7, rtol=0)


@pytest.mark.parametrize("values", [E2M1, NF4], ids=["e2m1", "nf4"])
def test_codes_are_the_nearest_and_ties_go_to_the_even_code(values: tuple[float, ...]):
    levels = torch.tensor(values)
    numbers = torch.cat((normal(100_000) * max(values) / 2, levels, torch.tensor([1e30, -1e30])))
    codes = nearest_codes(numbers, values).long()
    gaps = (numbers.double()[:, None] - levels.double()).abs()
    assert torch.equal(gaps.gather(1, codes[:, None])[:, 0], gaps.min(dim=1).values)
    assert torch.equal(levels[codes[100_000:-2]], levels)
    assert levels[codes[-2:]].tolist() == [max(values), min(values)]
    ordered = levels.unique()
    middles = (ordered[1:] + ordered[:-1]) / 2
    exact = (ordered[1:].double() - middles.double()) == (middles.double() - ordered[:-1].double())
    assert exact.sum() >= 2
    assert (nearest_codes(middles[exact], values) % 2 == 0).all()
    for side in (-1, 1):
        shifted = middles.nextafter(torch.full_like(middles, side * torch.inf))
        expected = ordered[1:] if side > 0 else ordered[:-1]
        assert torch.equal(levels[nearest_codes(shifted, values).long()], expected)


def test_midpoints_of_e2m1():
    """Half to even mantissa: .25 -> 0, .75 -> 1, 1.25 -> 1, 1.75 -> 2, 2.5 -> 2, 3.5 -> 4, 5 -> 4, and never -0."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    wanted = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    levels = torch.tensor(E2M1)
    assert torch.equal(levels[nearest_codes(middles, E2M1).long()], wanted)
    assert torch.equal(levels[nearest_codes(-middles, E2M1).long()], -wanted)
    assert nearest_codes(torch.tensor([-0.0, -0.1, -0.25]), E2M1).tolist() == [0, 0, 0]


@pytest.mark.parametrize("number", FLOATS)
@pytest.mark.parametrize("clip", [False, True])
def test_numbers_lie_on_the_grid_and_are_the_nearest_there(number: str, clip: bool):
    layout = RowFormat(4, 96, number_format(number, 4).usual_group, number)
    numbers = normal(30, 96) * torch.logspace(-2, 2, 30)[:, None]
    packed = rowwise.pack(numbers, layout, clip=clip)
    scale = rowwise.fields(packed, layout)[1].view(30, -1, 1)
    grid = (torch.tensor(layout.format.values).unique() * scale).repeat_interleave(layout.group, 1)[:, :96]
    back = rowwise.unpack(packed, layout)
    assert (back[..., None] == grid).any(-1).all()
    best = (numbers[..., None].double() - grid.double()).abs().min(-1).values
    gap = (back.double() - numbers).abs()
    # A number is divided by its scale in float32, so one beside a midpoint may fall to either side.
    assert torch.allclose(gap, best, atol=0, rtol=1e-5)


@pytest.mark.parametrize("number", FLOATS)
@pytest.mark.parametrize("clip", [False, True])
def test_powers_of_two_pass_through(number: str, clip: bool):
    """In another unit the same codes, and numbers scaled to the bit. (NVFP4 has its tensor's scale for that.)"""
    layout = RowFormat(4, 96, number_format(number, 4).usual_group, number)
    numbers = normal(30, 96)
    for power in (-3, 2, 5) if number != "mxfp4" else (-30, -3, 2, 30):
        factor = 2.0**power
        if number == "nvfp4":
            numbers = numbers.clamp(min=-3, max=3)
            factor = 2.0 ** abs(power)
        assert torch.equal(rounded(numbers * factor, layout, clip=clip), rounded(numbers, layout, clip=clip) * factor)


def test_fp4_is_the_formula_of_llm_fp4():
    """E2M1 with a real exponent bias b: clamp, exponent max(floor(log2 |x| + b), 1), step of the mantissa. And its
    identity: with bias b + k, x rounds to 2^-k times what 2^k x rounds to with bias b; in float32, to the bit."""
    numbers = normal(100_000) * 3
    scales = torch.rand(100_000, generator=torch.Generator().manual_seed(1)) + 0.5
    bias = 1 - scales.double().log2()
    largest = 1.5 * 2 ** (3 - bias)
    clamped = numbers.double().clamp(-largest, largest)
    exponent = (clamped.abs().log2() + bias).floor().clamp(min=1)
    step = 2 ** (exponent - 1 - bias)
    formula = (clamped / step).round() * step
    levels = torch.tensor(E2M1)
    ours = levels[nearest_codes(numbers / scales, E2M1).long()] * scales
    assert torch.allclose(ours.double(), formula, rtol=1e-6, atol=1e-9)
    for shift in range(1, 4):
        moved = levels[nearest_codes(numbers / (scales * 2.0**-shift), E2M1).long()] * (scales * 2.0**-shift)
        unit = levels[nearest_codes(numbers * 2.0**shift / scales, E2M1).long()] * scales
        assert torch.equal(moved, unit * 2.0**-shift)


def test_the_search_of_llm_fp4_tries_its_hundred_factors():
    layout, numbers = RowFormat(4, 64, 64, "fp4"), normal(20, 64)
    error = (rounded(numbers, layout, clip=True) - numbers).square().sum(1)
    largest, errors = numbers.abs().amax(1, keepdim=True), []
    for factor in [1.0, *torch.linspace(0.01, 1.2, 100).tolist()]:
        scale = (largest * factor / 6).half().float()
        errors.append(
            (torch.tensor(E2M1)[nearest_codes(numbers / scale, E2M1).long()] * scale - numbers).square().sum(1)
        )
    assert torch.allclose(error, torch.stack(errors).min(0).values, rtol=1e-3)
    assert error.sum() < 0.9 * (rounded(numbers, layout) - numbers).square().sum()


def test_mxfp4_scales_are_powers_of_two_by_the_floor_rule():
    """Exponent floor(log2 largest) - 2 with bias 127, held in 0 to 254: 255 stands for NaN. Above 6 scales all
    saturate, unless the search takes the next power."""
    layout = RowFormat(4, 32, 32, "mxfp4")
    largest = torch.tensor([1.0, 3.999, 4.0, 6.0, 7.9, 8.0, 2.0**-140, 3e38])
    numbers = torch.zeros(8, 32)
    numbers[:, 5] = -largest
    packed = rowwise.pack(numbers, layout)
    expected = (largest.double().log2().floor() - 2 + 127).clamp(0, 254)
    assert packed[:, 0, -1].tolist() == expected.int().tolist()
    back = rowwise.unpack(packed, layout)
    assert back[:6, 5].tolist() == [-1.0, -3.0, -4.0, -6.0, -6.0, -8.0]
    searched = rounded(numbers, layout, clip=True)
    assert searched[4, 5] == -8
    assert (back[:, :5] == 0).all()


def test_nvfp4_scales_are_e4m3():
    """At most 448, at least 2^-9, three bits of mantissa; a block at the format's top is kept exactly."""
    layout = RowFormat(4, 16, 16, "nvfp4")
    numbers = torch.zeros(5, 16)
    numbers[:, 0] = torch.tensor([NVFP4_TOP, 1.0, 6 * 2.0**-9, 1e-9, 0.0])
    packed = rowwise.pack(numbers, layout)
    scale = packed[:, 0, -1].contiguous().view(torch.float8_e4m3fn).float()
    assert NVFP4_TOP == 2688
    assert scale.tolist() == [448.0, 0.171875, 2.0**-9, 2.0**-9, 2.0**-9]
    assert rowwise.unpack(packed, layout)[:, 0].tolist() == [2688.0, 6 * 0.171875, 6 * 2.0**-9, 0.0, 0.0]
    assert torch.tensor([448.0]).to(torch.float8_e4m3fn).view(torch.uint8).item() == 0b0_1111_110


@pytest.mark.parametrize(
    ("bits", "number", "symmetric", "group", "gaussian", "laplace", "outliers"),
    [
        (8, "int", True, 768, 42.29, 38.51, 30.58),
        (4, "int", True, 768, 17.11, 13.50, 6.16),
        (4, "int", True, 128, 18.61, 15.89, 10.37),
        (4, "int", True, 32, 20.26, 18.34, 15.53),
        (4, "int", False, 32, 22.13, 20.75, 20.04),
        (3, "int", True, 64, 11.99, 10.01, 7.91),
        (2, "int", False, 32, 8.12, 6.76, 5.49),
        (4, "nf4", False, 64, 20.73, 19.69, 16.60),
        (4, "nf4", False, 768, 19.73, 17.09, 9.85),
        (4, "fp4", False, 64, 19.51, 19.00, 16.67),
        (4, "fp4", False, 768, 18.83, 16.89, 10.03),
        (4, "mxfp4", False, 32, 18.78, 17.93, 16.10),
        (4, "nvfp4", False, 16, 20.44, 20.66, 20.56),
    ],
)
def test_signal_to_noise(bits, number, symmetric, group, gaussian, laplace, outliers):
    """In dB, on 2000 x 768 numbers: Gaussian, Laplace, and Gaussian with every 96th column ten times as large."""
    layout = RowFormat(bits, 768, group, number)
    wide = normal(2000, 768)
    wide[:, ::96] *= 10
    uniform = torch.rand(2000, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
    heavy = -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.5 - 1e-12))
    for numbers, expected, tolerance in (
        (normal(2000, 768), gaussian, 0.15),
        (heavy, laplace, 0.5),
        (wide, outliers, 0.5),
    ):
        unit = float(numbers.abs().max()) / NVFP4_TOP if number == "nvfp4" else 1.0
        noise = rounded(numbers / unit, layout, symmetric).double() * unit - numbers
        ratio = 10 * torch.log10(numbers.double().square().sum() / noise.square().sum())
        assert abs(float(ratio) - expected) <= tolerance


def test_bits_of_a_number_with_its_scale():
    """As the formats are advertised: 4.25 bits for groups of 64 with a float16 scale and for MXFP4, 4.5 for NVFP4."""
    for number, group, expected in (("nf4", 64, 4.25), ("fp4", 64, 4.25), ("mxfp4", 32, 4.25), ("nvfp4", 16, 4.5)):
        assert number_format(number, 4).usual_group == group
        assert RowFormat(4, 768, group, number).row_bytes * 8 / 768 == expected


def test_what_there_is_not():
    assert set(BITS) == set(FORMATS)
    with pytest.raises(TautError, match="did you mean 'nf4'"):
        number_format("nf", 4)
    with pytest.raises(TautError, match="nf4 has no 8 bits: it has 4"):
        number_format("nf4", 8)
    for number in ("nf4", "fp4"):
        with pytest.raises(TautError, match="use bits: 8"):
            rowwise.pack(torch.full((1, 4), 1e9), RowFormat(4, 4, 4, number))
