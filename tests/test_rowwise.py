"""Packed rows: every width over odd shapes, bounds on the error, and that fast paths compute what the formulas say."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError
from taut.ops.quantization import rowwise, tied_head
from taut.ops.quantization.rowwise import RowFormat

INTEGERS = [
    *(RowFormat(8, 48, 48), RowFormat(8, 48, 16), RowFormat(8, 7, 7), RowFormat(8, 47, 9)),
    *(RowFormat(4, 48, 48), RowFormat(4, 48, 6), RowFormat(4, 47, 47), RowFormat(4, 47, 9)),
    *(RowFormat(2, 48, 48), RowFormat(2, 47, 9), RowFormat(3, 48, 16), RowFormat(3, 47, 9)),
    *(RowFormat(6, 48, 48), RowFormat(6, 47, 9), RowFormat(3, 1, 1)),
]
FLOATS = [RowFormat(4, 48, 16, number) for number in ("nf4", "fp4", "mxfp4", "nvfp4")]
LAYOUTS = [*INTEGERS, *FLOATS, RowFormat(4, 47, 9, "nf4"), RowFormat(4, 47, 32, "mxfp4")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_all_bytes_survive(bits: int) -> None:
    """256 bytes of codes with step 1 and bias 0 are the integers themselves, and pack to themselves; the fused
    lookup reads them so too."""
    in_a_byte, layout = 8 // bits, RowFormat(bits, 256 * 8 // bits, 256 * 8 // bits)
    codes = torch.arange(256, dtype=torch.uint8)
    tail = torch.tensor([1.0, 0.0]).to(layout.format.scale_dtype).view(torch.uint8)
    packed = torch.cat((codes, tail))[None, None]
    integers = torch.stack([codes >> place * bits & 2**bits - 1 for place in range(in_a_byte)], dim=1).flatten()
    assert torch.equal(rowwise.unpack(packed, layout)[0], integers.float())
    assert torch.equal(rowwise.lookup(packed, torch.tensor([0]), layout)[0], integers.float())
    assert torch.equal(rowwise.pack(integers.float()[None], layout), packed)


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize(("rows", "width", "group"), [(1, 1, 1), (3, 7, 7), (5, 47, 10), (2, 130, 64), (9, 33, 5)])
def test_every_code_of_every_width_survives(bits: int, rows: int, width: int, group: int) -> None:
    """Integers over the whole range come back as they are, and pack again to the same bytes."""
    layout = RowFormat(bits, width, group)
    codes = torch.randint(2**bits, (rows, width), generator=torch.Generator().manual_seed(bits)).float()
    codes[:, ::group] = 0
    codes[:, 1::group] = 2**bits - 1
    packed = rowwise.pack(codes, layout)
    assert packed.shape == (rows, layout.groups, layout.group_bytes)
    assert packed.nbytes == rows * layout.row_bytes
    back = rowwise.unpack(packed, layout)
    assert torch.allclose(back, codes, atol=2e-3 * 2**bits)
    if group > 1 and width % group != 1:
        assert torch.equal(back, codes)
    assert torch.equal(rowwise.pack(back, layout), packed)


@pytest.mark.parametrize("layout", INTEGERS, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_within_half_a_step(layout: RowFormat, symmetric: bool) -> None:
    numbers = normal(60, layout.width) * torch.logspace(-3, 3, 60)[:, None] + normal(60, 1) * 5
    packed = rowwise.pack(numbers, layout, symmetric)
    step = rowwise.fields(packed, layout)[1].double()
    gap = (rowwise.unpack(packed, layout).double() - numbers.double()).abs()
    gap = F.pad(gap, (0, layout.groups * layout.group - layout.width)).view(-1, layout.group)
    slack = 2 * torch.finfo(torch.float32).eps * numbers.abs().max(dim=1, keepdim=True).values.double()
    assert (gap <= step / 2 + slack.repeat_interleave(layout.groups, 0)).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_packing_again_changes_nothing(layout: RowFormat, symmetric: bool) -> None:
    """Except in a last group of two numbers: a float16 bias may be too coarse for its range."""
    full = layout.width // layout.group * layout.group
    once = rowwise.unpack(rowwise.pack(normal(50, layout.width), layout, symmetric), layout)
    twice = rowwise.unpack(rowwise.pack(once, layout, symmetric), layout)
    assert torch.allclose(once[:, :full], twice[:, :full], rtol=2e-6, atol=1e-6)
    assert torch.allclose(once, twice, rtol=2e-3, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_equal_numbers(layout: RowFormat, symmetric: bool) -> None:
    for value in (0.0, 0.3, -0.3):
        numbers = torch.full((2, layout.width), value)
        back = rowwise.unpack(rowwise.pack(numbers, layout, symmetric), layout)
        coarse = {"mxfp4": 0.2, "nvfp4": 0.07}.get(layout.number, 1e-3)
        assert torch.allclose(back, numbers, rtol=coarse, atol=0)
        assert value or torch.equal(back, numbers)


@pytest.mark.parametrize("layout", INTEGERS, ids=str)
def test_symmetric_keeps_zero(layout: RowFormat) -> None:
    numbers = normal(20, layout.width)
    numbers[:, ::3] = 0
    assert (rowwise.unpack(rowwise.pack(numbers, layout, symmetric=True), layout)[:, ::3] == 0).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2000,)])
def test_fused_lookup_is_the_formula(layout: RowFormat, shape: tuple[int, ...]) -> None:
    packed = rowwise.pack(normal(40, layout.width), layout)
    ids = torch.randint(40, shape, generator=torch.Generator().manual_seed(1))
    expected = rowwise.unpack(packed, layout)[ids]
    for kind in (torch.long, torch.int32):
        rows = rowwise.lookup(packed, ids.to(kind), layout)
        assert rows.shape == (*shape, layout.width)
        assert torch.allclose(rows, expected, rtol=3e-7, atol=3e-7)
        # A code of few bits times a float16 is exact in float32, so there is one rounding either way.
        assert layout.bits == 8 or torch.equal(rows, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_ids_that_do_not_lie_side_by_side(layout: RowFormat) -> None:
    packed = rowwise.pack(normal(40, layout.width), layout)
    ids = torch.arange(40).view(8, 5)
    for strided in (ids[:, 1], ids.T, ids[:1].expand(3, -1)):
        assert torch.equal(rowwise.lookup(packed, strided, layout), rowwise.lookup(packed, strided.clone(), layout))


def test_without_the_fused_lookup() -> None:
    """What a device that lacks it does: gather, then the formula. Seen on the meta device for its shape."""
    for layout in LAYOUTS:
        packed = rowwise.pack(normal(40, layout.width), layout)
        rows = rowwise.lookup(packed.to("meta"), torch.zeros(3, 2, dtype=torch.long, device="meta"), layout)
        assert (rows.shape, rows.dtype) == ((3, 2, layout.width), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("identifier", [-1, 40, 2**40])
def test_ids_outside_the_table(layout: RowFormat, identifier: int) -> None:
    packed = rowwise.pack(normal(40, layout.width), layout)
    with pytest.raises(IndexError, match="40 rows"):
        rowwise.lookup(packed, torch.tensor([0, identifier]), layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_tied_head(layout: RowFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores and gradient equal those of the dense equivalent, in pieces that do not divide the table."""
    monkeypatch.setitem(tied_head.EXPANDED_AT_ONCE, "cpu", 7 * layout.width)
    monkeypatch.setattr(tied_head, "CODES_AT_ONCE", 7 * layout.width)
    packed = rowwise.pack(normal(40, layout.width), layout)
    dense = rowwise.unpack(packed, layout)
    hidden, pull = normal(2, 3, layout.width).requires_grad_(), normal(2, 3, 40, seed=3)
    (ours,) = torch.autograd.grad(tied_head.logits(hidden, packed, layout), hidden, pull)
    (theirs,) = torch.autograd.grad(hidden @ dense.T, hidden, pull)
    for tokens in (hidden, hidden[:, :1], hidden[0, 0], hidden[:0]):
        expected = tokens.double() @ dense.T.double()
        assert torch.allclose(tied_head.logits(tokens, packed, layout).double(), expected, atol=1e-5)
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipping_never_adds_error(layout: RowFormat, symmetric: bool) -> None:
    numbers = normal(50, layout.width) ** 3
    plain, clipped = (
        F.pad(
            rowwise.unpack(rowwise.pack(numbers, layout, symmetric, clip), layout) - numbers,
            (0, layout.groups * layout.group - layout.width),
        )
        .view(-1, layout.group)
        .square()
        .sum(1)
        for clip in (False, True)
    )
    assert (clipped <= plain * (1 + 1e-6)).all()
    assert layout.bits >= 6 or layout.width == 1 or clipped.sum() < 0.99 * plain.sum()


def test_numbers_that_cannot_be_stored() -> None:
    with pytest.raises(TautError, match="not finite"):
        rowwise.pack(torch.tensor([[1.0, float("nan")]]), RowFormat(8, 2, 2))
    with pytest.raises(TautError, match="use bits: 8"):
        rowwise.pack(torch.tensor([[-1e5, 1e5]]), RowFormat(4, 2, 2))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_operators_are_sound(layout: RowFormat) -> None:
    """Shapes, aliasing and gradients as torch's compilers assume them."""
    packed, shape = (
        rowwise.pack(normal(9, layout.width), layout),
        (layout.bits, layout.width, layout.group, layout.number),
    )
    ids, hidden = torch.tensor([[1, 2, 8]]), normal(2, layout.width).requires_grad_()
    torch.library.opcheck(torch.ops.taut.rowwise_lookup.default, (packed, ids, *shape, torch.bfloat16))
    torch.library.opcheck(torch.ops.taut.rowwise_tied_head.default, (hidden, packed, *shape))
