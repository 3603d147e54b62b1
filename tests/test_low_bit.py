"""The low-bit methods: formats, bounds on the error, and that fast paths compute what the plain formulas say."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError
from taut.core.site import LinearSite, TableSite
from taut.kernels import int8_linear, rowwise, tied_head
from taut.kernels.rowwise import RowFormat
from taut.methods.embedding.low_bit import LowBitEmbedding
from taut.methods.linear.low_bit import LowBitLinear
from taut.methods.part import Calibration

CPU = torch.device("cpu")
NOTHING = Calibration()
LAYOUTS = [RowFormat(8, 48, 48), RowFormat(8, 48, 16), RowFormat(8, 7, 7), RowFormat(4, 48, 48), RowFormat(4, 48, 6)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def table_site(rows: int = 40, width: int = 48, **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", rows=rows, width=width, **fields)


def line(outputs: int, inputs: int, bias: bool = True, dtype: str = "float32") -> LinearSite:
    return LinearSite(slot="feedforward", path="a.b", dtype=dtype, inputs=inputs, outputs=outputs, bias=bias)


def fitted(method, site, weight: Tensor, dtype: torch.dtype = torch.float32):
    part = method.build(site, CPU, dtype)
    method.fit(part, weight, NOTHING)
    return part


def table(knobs: dict, weight: Tensor | None = None, **fields):
    weight = normal(40, 48) if weight is None else weight
    return fitted(LowBitEmbedding.parse(knobs), table_site(*weight.shape, **fields), weight)


def int8(outputs: int, inputs: int, seed: int = 0, **knobs):
    part = fitted(LowBitLinear.parse(knobs), line(outputs, inputs), normal(outputs, inputs, seed=seed) * inputs**-0.5)
    part.bias.data.copy_(normal(outputs, seed=seed + 1))
    return part


class TestRows:
    @pytest.mark.parametrize("bits", [8, 4])
    def test_all_bytes_survive(self, bits: int) -> None:
        """256 codes (or pairs of codes) with step 1 and bias 0 are the integers themselves, and pack to themselves."""
        layout = RowFormat(bits, 256 * 8 // bits, 256 * 8 // bits)
        codes = torch.arange(256, dtype=torch.uint8)
        tail = torch.tensor([1.0, 0.0]).to(layout.scale_dtype).view(torch.uint8)
        packed = torch.cat((codes, tail))[None, None]
        integers = codes if bits == 8 else torch.stack((codes % 16, codes // 16), dim=1).flatten()
        assert torch.equal(rowwise.unpack(packed, layout)[0], integers.float())
        assert torch.equal(rowwise.pack(integers.float()[None], layout), packed)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_within_half_a_step(self, layout: RowFormat, symmetric: bool) -> None:
        numbers = normal(60, layout.width) * torch.logspace(-3, 3, 60)[:, None] + normal(60, 1) * 5
        packed = rowwise.pack(numbers, layout, symmetric)
        tail = packed.flatten(0, 1)[:, -2 * layout.scale_dtype.itemsize :]
        step = tail.contiguous().view(layout.scale_dtype)[:, :1].double()
        gap = (rowwise.unpack(packed, layout).double() - numbers.double()).abs().view(-1, layout.group)
        slack = 2 * torch.finfo(torch.float32).eps * numbers.abs().max(dim=1, keepdim=True).values.double()
        assert (gap <= step / 2 + slack.repeat_interleave(layout.groups, 0)).all()

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_packing_again_changes_nothing(self, layout: RowFormat, symmetric: bool) -> None:
        once = rowwise.unpack(rowwise.pack(normal(50, layout.width), layout, symmetric), layout)
        twice = rowwise.unpack(rowwise.pack(once, layout, symmetric), layout)
        assert torch.allclose(once, twice, rtol=2e-6, atol=1e-6)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @pytest.mark.parametrize("symmetric", [False, True])
    def test_equal_numbers(self, layout: RowFormat, symmetric: bool) -> None:
        for value in (0.0, 0.3, -0.3):
            numbers = torch.full((2, layout.width), value)
            back = rowwise.unpack(rowwise.pack(numbers, layout, symmetric), layout)
            assert torch.allclose(back, numbers, rtol=1e-3, atol=0)
            assert value or torch.equal(back, numbers)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_symmetric_keeps_zero(self, layout: RowFormat) -> None:
        numbers = normal(20, layout.width)
        numbers[:, ::3] = 0
        assert (rowwise.unpack(rowwise.pack(numbers, layout, symmetric=True), layout)[:, ::3] == 0).all()

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2000,)])
    def test_fused_lookup_is_the_formula(self, layout: RowFormat, shape: tuple[int, ...]) -> None:
        packed = rowwise.pack(normal(40, layout.width), layout)
        ids = torch.randint(40, shape, generator=torch.Generator().manual_seed(1))
        expected = rowwise.unpack(packed, layout)[ids]
        for kind in (torch.long, torch.int32):
            found = rowwise.lookup(packed, ids.to(kind), layout)
            assert found.shape == (*shape, layout.width)
            assert torch.allclose(found, expected, rtol=3e-7, atol=3e-7)
            assert layout.bits == 8 or torch.equal(found, expected)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_ids_that_do_not_lie_side_by_side(self, layout: RowFormat) -> None:
        packed = rowwise.pack(normal(40, layout.width), layout)
        ids = torch.arange(40).view(8, 5)
        for strided in (ids[:, 1], ids.T, ids[:1].expand(3, -1)):
            assert torch.equal(rowwise.lookup(packed, strided, layout), rowwise.lookup(packed, strided.clone(), layout))

    def test_without_the_fused_lookup(self) -> None:
        """What a device that lacks it does: gather, then the formula. Seen on the meta device for its shape."""
        for layout in LAYOUTS:
            packed = rowwise.pack(normal(40, layout.width), layout)
            found = rowwise.lookup(packed.to("meta"), torch.zeros(3, 2, dtype=torch.long, device="meta"), layout)
            assert (found.shape, found.dtype) == ((3, 2, layout.width), torch.float32)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    @pytest.mark.parametrize("identifier", [-1, 40, 2**40])
    def test_ids_outside_the_table(self, layout: RowFormat, identifier: int) -> None:
        packed = rowwise.pack(normal(40, layout.width), layout)
        with pytest.raises(IndexError, match="40 rows"):
            rowwise.lookup(packed, torch.tensor([0, identifier]), layout)

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_tied_head(self, layout: RowFormat, monkeypatch: pytest.MonkeyPatch) -> None:
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
    def test_clipping_never_adds_error(self, layout: RowFormat, symmetric: bool) -> None:
        numbers = normal(50, layout.width) ** 3
        plain, clipped = (
            (rowwise.unpack(rowwise.pack(numbers, layout, symmetric, clip), layout) - numbers)
            .view(-1, layout.group)
            .square()
            .sum(1)
            for clip in (False, True)
        )
        assert (clipped <= plain).all()
        assert layout.bits == 8 or clipped.sum() < 0.99 * plain.sum()

    def test_numbers_that_cannot_be_stored(self) -> None:
        with pytest.raises(TautError, match="not finite"):
            rowwise.pack(torch.tensor([[1.0, float("nan")]]), RowFormat(8, 2, 2))
        with pytest.raises(TautError, match="use bits: 8"):
            rowwise.pack(torch.tensor([[-1e5, 1e5]]), RowFormat(4, 2, 2))

    @pytest.mark.parametrize(
        ("bits", "symmetric", "group", "gaussian", "laplace", "outliers"),
        [
            (8, True, None, 42.29, 38.51, 30.58),
            (4, True, None, 17.11, 13.50, 6.16),
            (4, True, 128, 18.61, 15.89, 10.37),
            (4, True, 32, 20.26, 18.34, 15.53),
            (4, False, 32, 22.13, 20.75, 20.04),
        ],
    )
    def test_signal_to_noise(self, bits, symmetric, group, gaussian, laplace, outliers) -> None:
        """In dB, on 2000 x 768 numbers: Gaussian, Laplace, and Gaussian with every 96th column ten times as large."""
        layout = RowFormat(bits, 768, group or 768)
        wide = normal(2000, 768)
        wide[:, ::96] *= 10
        uniform = torch.rand(2000, 768, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5
        heavy = -uniform.sign() * torch.log1p(-2 * uniform.abs().clamp(max=0.5 - 1e-12))
        for numbers, expected, tolerance in (
            (normal(2000, 768), gaussian, 0.15),
            (heavy, laplace, 0.5),
            (wide, outliers, 0.5),
        ):
            noise = rowwise.unpack(rowwise.pack(numbers, layout, symmetric), layout).double() - numbers
            ratio = 10 * torch.log10(numbers.double().square().sum() / noise.square().sum())
            assert abs(float(ratio) - expected) <= tolerance

    @pytest.mark.parametrize("layout", LAYOUTS, ids=str)
    def test_operators_are_sound(self, layout: RowFormat) -> None:
        """Shapes, aliasing and gradients as torch's compilers assume them."""
        packed, shape = rowwise.pack(normal(9, layout.width), layout), (layout.bits, layout.width, layout.group)
        ids, hidden = torch.tensor([[1, 2, 8]]), normal(2, layout.width).requires_grad_()
        torch.library.opcheck(torch.ops.taut.rowwise_lookup.default, (packed, ids, *shape, torch.bfloat16))
        torch.library.opcheck(torch.ops.taut.rowwise_tied_head.default, (hidden, packed, *shape))


class TestTable:
    KNOBS = [{}, {"symmetric": True}, {"group": 16}, {"bits": 4}, {"bits": 4, "group": 8, "symmetric": True}]

    @pytest.mark.parametrize("knobs", KNOBS, ids=str)
    def test_predicted_is_stored(self, knobs: dict) -> None:
        method, site = LowBitEmbedding.parse(knobs), table_site(heads=("lm_head",))
        part = method.build(site, torch.device("meta"), torch.float32)
        (weight,) = part.state_dict().values()
        cost = method.predict(site)
        assert cost.bytes == weight.nbytes
        assert (cost.parameters, cost.flops_per_token) == (40 * 48, 2 * 40 * 48)
        assert weight.dim() == 3

    @pytest.mark.parametrize("knobs", KNOBS, ids=str)
    def test_forward_is_reference(self, knobs: dict) -> None:
        part = table(knobs, scale=3.0, padding_row=2)
        ids = torch.arange(40).view(4, 10)
        assert torch.allclose(part(ids), part.reference(ids), rtol=3e-7, atol=1e-6)
        assert torch.allclose(part(ids), part.merged()[ids] * 3.0, rtol=3e-7, atol=1e-6)
        hidden = normal(5, 48)
        assert torch.allclose(part.logits(hidden), hidden @ part.merged().T, atol=1e-4)

    def test_fit_is_deterministic_and_of_any_dtype(self) -> None:
        weight = normal(40, 48).bfloat16()
        assert torch.equal(table({"bits": 4}, weight).weight, table({"bits": 4}, weight.double()).weight)

    def test_dtype_follows_casts_and_codes_do_not(self) -> None:
        part = table({})
        codes = part.weight.clone()
        holder = torch.nn.Sequential(part)
        for cast, dtype in (
            (holder.half, torch.float16),
            (holder.bfloat16, torch.bfloat16),
            (holder.float, torch.float32),
        ):
            assert cast()[0](torch.tensor([1])).dtype == dtype
            assert part.logits(normal(2, 48).to(dtype)).dtype == dtype
            assert torch.equal(part.weight, codes)
        assert copy.deepcopy(holder.half())[0](torch.tensor([1])).dtype == torch.float16

    def test_start_is_sound(self) -> None:
        part = LowBitEmbedding.parse({"symmetric": True}).build(table_site(padding_row=3), CPU, torch.float32)
        assert 0.01 < part.merged().std() < 0.04
        assert (part(torch.tensor([3])) == 0).all()

    def test_keep_chooses_bits(self) -> None:
        site = table_site()
        bits = {keep: LowBitEmbedding.parse({}, keep).solve(site, keep).knobs.bits for keep in (1.0, 0.3, 0.29, 0.16)}
        assert bits == {1.0: 8, 0.3: 8, 0.29: 4, 0.16: 4}
        with pytest.raises(TautError, match=r"the least is 0\.1458"):
            LowBitEmbedding.parse({}, 0.1).solve(site, 0.1)

    @pytest.mark.parametrize(
        ("knobs", "width", "reason"),
        [
            ({"group": 11}, 48, "does not divide the width 48; the nearest that does is 12"),
            ({"bits": 4, "group": 3}, 48, "group 3 is odd"),
            ({"bits": 4}, 47, "width 47 is odd"),
            ({"group": 96}, 48, "the nearest that does is 48"),
        ],
    )
    def test_sizes_that_do_not_fit(self, knobs: dict, width: int, reason: str) -> None:
        assert reason in LowBitEmbedding.parse(knobs).fits(table_site(width=width))
        assert LowBitEmbedding.parse({}).fits(table_site(width=width)) is None

    def test_refuses_other_sites_and_knobs(self) -> None:
        assert "not a token table" in LowBitEmbedding.parse({}).fits(line(4, 4))
        with pytest.raises(TautError, match="bits = 5"):
            LowBitEmbedding.parse({"bits": 5})
        with pytest.raises(TautError, match="keep or bits"):
            LowBitEmbedding.parse({"bits": 4}, 0.5)


SHAPES = [(64, 48), (33, 7), (5, 130), (256, 1024)]


class TestInt8Linear:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_codes_are_near(self, shape: tuple[int, int]) -> None:
        weight = normal(*shape)
        parts = int8_linear.unpack(int8_linear.pack(weight), *shape)
        gap = (int8_linear.expand(parts) - weight).abs()
        assert (gap <= parts.scales[:, None] * 0.5001).all()
        assert torch.equal(parts.sums.long(), parts.codes.long().sum(1))
        assert parts.codes.min() >= -127

    @pytest.mark.parametrize("tokens", [1, 3, 16, 200])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_integer_product_is_exact(self, shape: tuple[int, int], tokens: int) -> None:
        """The kernel multiplies integers without error or saturation, so every path must give these very numbers."""
        if not int8_linear.integer_product_is_exact():
            pytest.skip("this processor has no exact product of uint8 and int8")
        codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        x = normal(tokens, shape[1]) + 2
        q, step, low = int8_linear.quantise_tokens(x)
        exact = q.double() @ codes.double().T
        assert torch.equal(torch._int_mm(q, codes.T).double(), exact)
        weight = int8_linear.Int8Weight(codes, torch.ones(shape[0]), codes.sum(1, dtype=torch.int32).float())
        answer = int8_linear._scaled_product(q, step, low, weight, None).double()
        expected = exact * step.double() + low.double() * weight.sums.double()
        assert torch.allclose(answer, expected, rtol=0, atol=1e-6 * float(exact.max() * step.max()))

    @pytest.mark.parametrize("tokens", [1, 5, 64])
    @pytest.mark.parametrize("width", [4, 7, 130, 768])
    def test_fused_rounding_is_the_formula(self, tokens: int, width: int) -> None:
        x = normal(tokens, width) * torch.logspace(-4, 4, tokens)[:, None] + 1
        x[0] = 3.25
        for fused, plain in zip(int8_linear.quantise_tokens(x), int8_linear.quantise_tokens_plainly(x), strict=True):
            assert torch.equal(fused, plain)
        q, step, low = int8_linear.quantise_tokens(x)
        gap = (q.double() * step + low - x).abs()
        assert (gap <= 0.5001 * step + 1e-6 * x.abs().max(dim=1, keepdim=True).values).all()

    @pytest.mark.parametrize("shape", SHAPES)
    def test_is_the_dense_map_on_rounded_inputs(self, shape: tuple[int, int]) -> None:
        part = int8(*shape)
        x = normal(9, shape[1], seed=5)
        q, step, low = int8_linear.quantise_tokens(x)
        rounded = q.double() * step + low
        expected = F.linear(rounded, part.merged().double(), part.bias.double())
        assert torch.allclose(part(x).double(), expected, atol=2e-5, rtol=1e-5)
        error = (part(x) - F.linear(x, part.merged(), part.bias)).norm() / part(x).norm()
        assert error < 0.02

    def test_float_activations_are_exact(self) -> None:
        part = int8(64, 48, activations="float")
        x = normal(9, 48)
        assert torch.equal(part(x), F.linear(x, part.merged(), part.bias))

    @pytest.mark.parametrize("tokens", [1, 2, 17, 300])
    def test_a_token_does_not_see_the_others(self, tokens: int) -> None:
        """To the bit: alone, in company, and beside tokens a thousand times as large."""
        part = int8(96, 64)
        x = normal(tokens, 64)
        with torch.no_grad():
            together = part(x)
            assert torch.equal(part(torch.cat((x, normal(3, 64, seed=2) * 1000)))[:tokens], together)
            for index in {0, tokens // 2, tokens - 1}:
                assert torch.equal(part(x[index : index + 1])[0], together[index])
            assert torch.equal(part(x.view(1, tokens, 64).expand(2, -1, -1))[1], together)

    def test_empty_and_not_finite(self) -> None:
        part = int8(6, 8)
        assert part(torch.empty(2, 0, 8)).shape == (2, 0, 6)
        x = normal(2, 8)
        x[1] = float("nan")
        assert part(x)[0].isfinite().all()
        assert part(x)[1].isnan().all()
        with pytest.raises(TautError, match="not finite"):
            int8_linear.pack(torch.tensor([[float("inf")]]))

    @pytest.mark.parametrize("activations", ["int8", "float"])
    def test_gradients_are_those_of_the_expanded_weight(self, activations: str) -> None:
        part = int8(32, 24, activations=activations)
        x, pull = normal(3, 5, 24).requires_grad_(), normal(3, 5, 32, seed=9)
        ours = torch.autograd.grad(part(x), (x, part.bias), pull)
        theirs = torch.autograd.grad(F.linear(x, part.merged(), part.bias), (x, part.bias), pull)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(part(x), part(x.detach().requires_grad_()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_casts_leave_codes_alone(self, dtype: torch.dtype) -> None:
        part = int8(32, 24)
        before = part.weight.clone()
        twin = copy.deepcopy(part).to(dtype)
        x = normal(4, 24)
        assert torch.equal(twin.weight, before)
        assert twin(x.to(dtype)).dtype == dtype
        assert torch.allclose(twin(x.to(dtype)).float(), part(x), atol=0.1)
        # T5 casts its hidden states to the dtype of this weight unless that is int8.
        assert twin.weight.dtype == torch.int8

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize(("bias", "dtype"), [(True, "float32"), (False, "bfloat16")])
    def test_predicted_is_stored(self, shape: tuple[int, int], bias: bool, dtype: str) -> None:
        method, site = LowBitLinear.parse({}), line(*shape, bias=bias, dtype=dtype)
        part = method.build(site, torch.device("meta"), getattr(torch, dtype))
        assert method.predict(site).bytes == sum(tensor.nbytes for tensor in part.state_dict().values())
        assert method.predict(site).parameters == site.dense().parameters
        assert part.weight.dim() == 1

    def test_keep(self) -> None:
        method, site = LowBitLinear.parse({}, 0.3), line(1024, 1024)
        assert method.solve(site, 0.3).knobs.bits == 8
        with pytest.raises(TautError, match=r"the least is 0\.25"):
            method.solve(site, 0.25)

    def test_refuses_other_sites_and_knobs(self) -> None:
        assert "not a linear map" in LowBitLinear.parse({}).fits(table_site())
        with pytest.raises(TautError, match="bits = 4"):
            LowBitLinear.parse({"bits": 4})

    def test_operator_is_sound(self) -> None:
        """Shape, aliasing and gradients as torch's compilers assume them."""
        x, bias, packed = normal(2, 3, 8).requires_grad_(), normal(6).requires_grad_(), int8(6, 8).weight
        for given in ((x, bias, packed, 6, 8, True), (x, None, packed, 6, 8, False)):
            torch.library.opcheck(torch.ops.taut.int8_linear.default, given)
