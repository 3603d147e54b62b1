"""Low-bit linear maps: exact costs, healing, and that fast paths compute what the plain formulas say."""

import copy
import itertools

import pytest
import torch
from low_bit_maps import CPU, GROUPED, INTEGER, ROUNDED, SHAPES, fitted, line, normal, seen, start
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from taut.core.errors import TautError
from taut.core.site import TableSite
from taut.methods.base import Calibration
from taut.methods.linear.low_bit.method import LowBitLinear
from taut.ops.quantization import grouped_linear, int8_linear


class Largest(TorchDispatchMode):
    """``numbers``: of the largest floating tensor that anything computed, views aside."""

    numbers = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        answer = operator(*args, **(kwargs or {}))
        if isinstance(answer, Tensor) and answer.is_floating_point() and not operator.is_view:
            self.numbers = max(self.numbers, answer.numel())
        return answer


class TestInt8Linear:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_codes_are_near(self, shape: tuple[int, int]) -> None:
        weight = normal(*shape)
        parts = int8_linear.unpack(int8_linear.pack(weight), *shape)
        gap = (int8_linear.expand(parts) - weight).abs()
        assert (gap <= parts.scales[:, None] * 0.5001).all()
        assert torch.equal(parts.sums.long(), parts.codes.long().sum(1))
        assert parts.codes.min() >= -127

    @pytest.mark.parametrize("has_product", [True, False])
    @pytest.mark.parametrize("tokens", [1, 3, 16, 200])
    @pytest.mark.parametrize("shape", [*SHAPES, (24, 1500)])
    def test_integer_product_is_exact(
        self, shape: tuple[int, int], tokens: int, has_product: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Integers are multiplied without error or saturation, so every path must give these very numbers."""
        if has_product and not int8_linear.has_integer_product():
            pytest.skip("this processor has no fast exact product of uint8 and int8")
        monkeypatch.setattr(int8_linear, "has_integer_product", lambda: has_product)
        codes = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        # The greatest sums there can be: a row and a token of nothing but extremes.
        codes[0] = 127
        x = normal(tokens, shape[1]) + 2
        q, step, low = int8_linear.quantise_tokens(x)
        q[0] = 255
        exact = q.double() @ codes.double().T
        assert torch.equal(int8_linear.integer_product(q, codes), exact.float())
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
        part = fitted(*shape)
        x = normal(9, shape[1], seed=5)
        q, step, low = int8_linear.quantise_tokens(x)
        rounded = q.double() * step + low
        expected = F.linear(rounded, part.merged().double(), part.bias.double())
        assert torch.allclose(part(x).double(), expected, atol=2e-5, rtol=1e-5)
        error = (part(x) - F.linear(x, part.merged(), part.bias)).norm() / part(x).norm()
        assert error < 0.02

    @pytest.mark.parametrize("tokens", [1, 2, 17, 300])
    def test_a_token_does_not_see_the_others(self, tokens: int) -> None:
        """To the bit: alone, in company, and beside tokens a thousand times as large."""
        part = fitted(96, 64)
        x = normal(tokens, 64)
        with torch.no_grad():
            together = part(x)
            assert torch.equal(part(torch.cat((x, normal(3, 64, seed=2) * 1000)))[:tokens], together)
            for index in {0, tokens // 2, tokens - 1}:
                assert torch.equal(part(x[index : index + 1])[0], together[index])
            assert torch.equal(part(x.view(1, tokens, 64).expand(2, -1, -1))[1], together)

    def test_empty_and_not_finite(self) -> None:
        part = fitted(6, 8)
        assert part(torch.empty(2, 0, 8)).shape == (2, 0, 6)
        x = normal(2, 8)
        x[1] = float("nan")
        assert part(x)[0].isfinite().all()
        assert part(x)[1].isnan().all()
        with pytest.raises(TautError, match="not finite"):
            int8_linear.pack(torch.tensor([[float("inf")]]))

    @pytest.mark.parametrize("activations", ["int8", "static"])
    def test_gradients_are_those_of_the_expanded_weight(self, activations: str) -> None:
        part = fitted(32, 24, activations=activations)
        x, pull = normal(3, 5, 24).requires_grad_(), normal(3, 5, 32, seed=9)
        ours = torch.autograd.grad(part(x), (x, part.bias), pull)
        theirs = torch.autograd.grad(F.linear(x, part.merged(), part.bias), (x, part.bias), pull)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(part(x), part(x.detach().requires_grad_()))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_casts_leave_codes_alone(self, dtype: torch.dtype) -> None:
        part = fitted(32, 24)
        before = part.weight.clone()
        twin = copy.deepcopy(part).to(dtype)
        x = normal(4, 24)
        assert torch.equal(twin.weight, before)
        assert twin(x.to(dtype)).dtype == dtype
        assert torch.allclose(twin(x.to(dtype)).float(), part(x), atol=0.1)
        # T5 casts its hidden states to the dtype of this weight unless that is int8.
        assert twin.weight.dtype == torch.int8

    def test_operator_is_sound(self) -> None:
        """Shape, aliasing and gradients as torch's compilers assume them."""
        x, bias, packed = normal(2, 3, 8).requires_grad_(), normal(6).requires_grad_(), fitted(6, 8).weight
        reach = int8_linear.pack_range(-2.0, 3.0)
        for arguments in ((x, bias, packed, None, 6, 8), (x, None, packed, reach, 6, 8)):
            torch.library.opcheck(torch.ops.taut.int8_linear.default, arguments)

    def test_a_range_known_beforehand(self) -> None:
        """Numbers inside come back within half a step, zero as itself, those outside as the nearest end."""
        for least, greatest in ((-2.0, 5.0), (0.5, 3.0), (-7.0, -1.0), (0.0, 0.0)):
            reach = int8_linear.pack_range(least, greatest)
            x = torch.linspace(min(least, 0.0), max(greatest, 0.0), 1001).view(1, -1)
            q, step, low = int8_linear.quantise_in_range(x, reach)
            assert ((q * step + low - x).abs() <= 0.5001 * step).all()
            q, step, low = int8_linear.quantise_in_range(torch.tensor([[0.0, -1e9, 1e9]]), reach)
            back = (q * step + low)[0]
            assert abs(float(back[0])) <= 1e-6 * (greatest - least)
            assert (q[0, 1:] == torch.tensor([0, 255])).all()
        part = fitted(64, 48, activations="static")
        x = normal(9, 48, seed=5)
        q, step, low = int8_linear.quantise_in_range(x, part.input_range)
        expected = F.linear(q.double() * step.double() + low.double(), part.merged().double(), part.bias.double())
        assert torch.allclose(part(x).double(), expected, atol=2e-5, rtol=1e-5)
        with torch.no_grad():
            assert torch.equal(part(torch.cat((x, x * 1000)))[:9], part(x))

    def test_every_processor_gives_the_same_bits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for knobs in INTEGER:
            part, x = fitted(64, 1100, **knobs), normal(9, 1100, seed=5)
            answer = part(x)
            with monkeypatch.context() as patch:
                patch.setattr(int8_linear, "has_integer_product", lambda: False)
                assert torch.equal(part(x), answer)


class TestGroups:
    @pytest.mark.parametrize("knobs", GROUPED, ids=str)
    @pytest.mark.parametrize("shape", [(64, 48), (70, 33), (130, 5)])
    def test_weights_are_the_nearest_there_are(self, shape: tuple[int, int], knobs: dict) -> None:
        """No other code of a weight's group is nearer, so integers inside the range err by half a step at most."""
        codes, weight = fitted(*shape, compensate=False, **{**knobs, "clip": False}).codes, start(*shape)
        packed, form = codes.pack(weight), codes.form.row.format
        merged = codes.expand(packed)
        levels = form.levels(CPU)
        for block, index in itertools.product(range(codes.form.blocks), (0, shape[1] - 1)):
            here = slice(block * codes.form.group, min((block + 1) * codes.form.group, shape[0]))
            scale, bias = form.scales(packed[block, index, -form.tail_bytes :].view(1, -1).view(torch.uint8))
            values = levels * scale[0] if bias is None else levels * scale[0] + bias[0]
            gaps = (weight[here, index, None] - values).abs()
            assert torch.allclose((weight - merged)[here, index].abs(), gaps.amin(1), atol=1e-6)
            if form.bits > 4:
                assert (gaps.amin(1) <= 0.5001 * scale[0]).all()
        assert torch.equal(codes.repack(merged, packed), packed)
        round_column = codes.rounder(packed)
        for index in (0, shape[1] - 1):
            column = codes.expand(codes.repack(weight, packed))[:, index]
            assert torch.allclose(round_column(weight[:, index].double(), index).float(), column, rtol=3e-7)

    @pytest.mark.parametrize("knobs", GROUPED, ids=str)
    @pytest.mark.parametrize("shape", [(64, 48), (70, 33)])
    def test_forward_is_the_dense_map(self, shape: tuple[int, int], knobs: dict) -> None:
        part = fitted(*shape, **knobs)
        merged, bias = part.merged().double(), part.bias.double()
        for tokens in (0, 1, 2, grouped_linear.FEW_TOKENS, grouped_linear.FEW_TOKENS + 1, 40):
            x = normal(tokens, shape[1], seed=7)
            expected = F.linear(x.double(), merged, bias)
            with torch.no_grad():
                assert torch.allclose(part(x).double(), expected, atol=1e-5)
                assert torch.equal(part(x), part(x[None, :, None]).flatten(0, 2))
                assert torch.allclose(part(x.double()), expected, atol=2e-6)
            assert part(x).shape == (tokens, shape[0])

    @pytest.mark.parametrize("number", ["int", "nf4"])
    def test_the_weight_is_never_dense(self, number: str) -> None:
        """Whatever the number of tokens, nothing computed has as many numbers as the map."""
        part = fitted(2048, 1024, bits=4, number=number, compensate=False)
        for tokens in (1, 40):
            x = normal(tokens, 1024)
            with torch.no_grad(), Largest() as seen_here:
                part(x)
            assert 0 < seen_here.numbers <= 2048 * 1024 // 4

    @pytest.mark.parametrize("knobs", [{"bits": 4}, {"bits": 4, "number": "nf4"}, {"bits": 8, "group": 16}], ids=str)
    def test_gradients_are_those_of_the_expanded_weight(self, knobs: dict) -> None:
        part = fitted(70, 24, **knobs)
        x, pull = normal(3, 5, 24).requires_grad_(), normal(3, 5, 70, seed=9)
        ours = torch.autograd.grad(part(x), (x, part.bias), pull)
        theirs = torch.autograd.grad(F.linear(x, part.merged(), part.bias), (x, part.bias), pull)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(part(x), part(x.detach().requires_grad_()))

    def test_operators_are_sound(self) -> None:
        x, bias = normal(2, 3, 8).requires_grad_(), normal(6).requires_grad_()
        for number in ("int", "nf4"):
            packed = fitted(6, 8, bits=4, number=number).weight
            torch.library.opcheck(torch.ops.taut.low_bit_linear.default, (x, bias, packed, 6, 4, 6, number))
        arguments = (normal(2, 3, 6), packed, 6, 4, 6, "nf4")
        torch.library.opcheck(torch.ops.taut.low_bit_linear_gradient.default, arguments)

    @pytest.mark.parametrize(
        "knobs", [{"bits": 4}, {"activations": "static"}, {"bits": 4, "activations": "fp8"}], ids=str
    )
    def test_compiled_is_eager(self, knobs: dict) -> None:
        part, x = fitted(64, 48, **knobs), normal(5, 48)
        compiled = torch.compile(part, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(x), part(x), atol=1e-6)
        torch.compiler.reset()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_rounded_once(self, dtype: torch.dtype) -> None:
        part = fitted(64, 48, bits=4)
        twin = copy.deepcopy(part).to(dtype)
        assert torch.equal(twin.weight, part.weight)
        for tokens in (1, 9):
            x = normal(tokens, 48).to(dtype)
            expected = F.linear(x.double(), part.merged().double(), twin.bias.double())
            assert twin(x).dtype == dtype
            assert torch.allclose(twin(x).double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-4)


class TestHealing:
    @pytest.mark.parametrize("knobs", [*GROUPED, *ROUNDED], ids=str)
    @pytest.mark.parametrize("compensate", [False, True])
    def test_unpacked_is_what_it_will_be(self, knobs: dict, compensate: bool) -> None:
        part = fitted(70, 48, seen(48), compensate=compensate, **knobs)
        x = normal(6, 48)
        names = {name: (one.shape, one.dtype) for name, one in part.state_dict().items()}
        before, answer, codes = part.merged(), part(x), part.weight.clone()
        for original in (start(70, 48), None):
            part.unpack(original)
            assert part.weight_unpacked.dtype == torch.float32
            assert torch.allclose(part.merged(), before, rtol=3e-7)
            assert torch.allclose(part(x), answer, atol=1e-5)
            (gradient,) = torch.autograd.grad(part(x).sum(), part.weight_unpacked)
            inputs = part.codes.rounded(x, part.input_range)
            assert torch.allclose(gradient, inputs.sum(0).expand(70, -1), atol=1e-4)
            if original is not None and not compensate:
                assert torch.equal(part.weight_unpacked, original)
            part.repack()
            assert torch.equal(part.weight, codes)
            assert {name: (one.shape, one.dtype) for name, one in part.state_dict().items()} == names

    @pytest.mark.parametrize("knobs", [{"bits": 2, "group": 16}, {"bits": 4, "number": "nf4"}, {}], ids=str)
    def test_healing_lowers_the_loss(self, knobs: dict) -> None:
        part, x = fitted(70, 48, **knobs), normal(40, 48, seed=4)
        target = F.linear(x, start(70, 48) + 0.3 * start(70, 48).roll(1, 0))

        def loss() -> Tensor:
            return (part(x) - target).square().mean()

        before = loss().item()
        part.unpack()
        optimiser = torch.optim.Adam(part.parameters(), lr=0.01)
        for _ in range(60):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
        part.repack()
        assert loss().item() < 0.3 * before

    def test_what_ran_away_is_not_stored(self) -> None:
        part = fitted(6, 8)
        part.unpack()
        part.weight_unpacked.data[0] = torch.nan
        with pytest.raises(TautError, match="not finite"):
            part.repack()


class TestMethod:
    @pytest.mark.parametrize("knobs", [*GROUPED, *ROUNDED], ids=str)
    @pytest.mark.parametrize("shape", [(64, 48), (130, 5)])
    @pytest.mark.parametrize(("bias", "dtype"), [(True, "float32"), (False, "bfloat16")])
    def test_predicted_is_stored(self, shape: tuple[int, int], bias: bool, dtype: str, knobs: dict) -> None:
        method, site = LowBitLinear.parse(knobs), line(*shape, bias=bias, dtype=dtype)
        part = method.build(site, torch.device("meta"), getattr(torch, dtype))
        real = method.build(site, CPU, getattr(torch, dtype))
        assert real(normal(2, shape[1]).to(getattr(torch, dtype))).isfinite().all()
        state = real.state_dict()
        assert {name: one.shape for name, one in state.items()} == {k: v.shape for k, v in part.state_dict().items()}
        stored = save(state)
        assert method.predict(site).bytes == len(stored) - 8 - int.from_bytes(stored[:8], "little")
        assert method.predict(site).parameters == site.dense().parameters == part.numbers()
        # Another shape than the dense weight's, so a folder opened without taut is an error; int8, because T5 casts its
        # hidden states to the dtype of this weight unless it is that.
        assert part.weight.dim() != 2
        assert part.weight.dtype == torch.int8

    def test_bits_of_a_weight(self) -> None:
        """Scales included, of a large map in float32: the least memory moves one token's product."""
        site = line(2048, 2048, bias=False)
        wanted = {"int": 4.5, "nf4": 4.25, "fp4": 4.25, "mxfp4": 4.25}
        for number, bits in wanted.items():
            method = LowBitLinear.parse({"bits": 4, "number": number})
            assert 8 * method.predict(site).bytes / 2048**2 == bits

    @pytest.mark.parametrize("outputs", [5, 64, 65, 70, 384, 1000])
    def test_usual_groups_leave_little_empty(self, outputs: int) -> None:
        for knobs, usual in (({"bits": 4}, 64), ({"activations": "float"}, 256)):
            form = LowBitLinear.parse(knobs)._codes(line(outputs, 8)).form
            assert form.group <= usual
            assert 0 <= form.blocks * form.group - outputs < 8 * form.blocks
            assert form.blocks == -(-outputs // usual)

    def test_keep_chooses_bits(self) -> None:
        site, wanted = line(1024, 1024), {1.0: 8, 0.3: 8, 0.25: 6, 0.21: 6, 0.2: 4, 0.13: 3, 0.1: 2}
        assert {keep: LowBitLinear.parse({}, keep).solve(site, keep).knobs.bits for keep in wanted} == wanted
        with pytest.raises(TautError, match=r"the least is 0\.07"):
            LowBitLinear.parse({}, 0.07).solve(site, 0.07)
        assert LowBitLinear.parse({"number": "nf4"}, 0.2).solve(site, 0.2).knobs.bits == 4
        with pytest.raises(TautError, match=r"the least is 0\.25"):
            LowBitLinear.parse({"activations": "static"}, 0.25).solve(site, 0.25)
        with pytest.raises(TautError, match="symmetric"):
            LowBitLinear.parse({"number": "nf4", "symmetric": True}, 0.5).solve(site, 0.5)

    def test_calibration_is_asked_for_where_it_is_used(self) -> None:
        wanted = {
            (): set(),
            (("bits", 6),): set(),
            (("bits", 4),): {"gram"},
            (("bits", 4), ("compensate", False)): set(),
            (("compensate", True),): {"gram"},
            (("activations", "static"),): {"least", "greatest"},
            (("bits", 3), ("activations", "fp8")): {"gram", "least", "greatest"},
        }
        assert {knobs: set(LowBitLinear.parse(dict(knobs)).needs) for knobs in wanted} == wanted
        for activations in ("static", "fp8", "fp4"):
            method = LowBitLinear.parse({"activations": activations})
            part = method.build(line(6, 8), CPU, torch.float32)
            with pytest.raises(TautError, match=f"activations: {activations} needs the inputs' ranges"):
                method.fit(part, start(6, 8), Calibration())

    @pytest.mark.parametrize(
        ("knobs", "reason"),
        [
            ({"number": "nf4"}, "number: nf4 needs bits: 4, not 8"),
            ({"bits": 4, "activations": "int8"}, "activations: int8 needs bits: 8, not 4"),
            ({"bits": 6, "activations": "static"}, "activations: static needs bits: 8, not 6"),
            ({"activations": "int8", "group": 16}, "one scale per output; drop group and clip"),
            ({"bits": 4, "number": "fp4", "symmetric": True}, "centred on zero by itself"),
            ({"bits": 4, "number": "mxfp4", "group": 16}, "groups of 32 by definition, not 16"),
            ({"bits": 4, "group": 65}, "group 65 is more than the 64 outputs"),
        ],
    )
    def test_what_does_not_fit_is_refused_in_words(self, knobs: dict, reason: str) -> None:
        assert reason in LowBitLinear.parse(knobs).fits(line(64, 48))

    def test_refuses_other_sites_and_knobs(self) -> None:
        table = TableSite(slot="embedding", path="embed", rows=40, width=48)
        assert "not a linear map" in LowBitLinear.parse({}).fits(table)
        for knobs, match in (
            ({"bits": 5}, "bits = 5"),
            ({"number": "nvfp4"}, "number = 'nvfp4'"),
            ({"bit": 4}, "bits"),
        ):
            with pytest.raises(TautError, match=match):
                LowBitLinear.parse(knobs)
        with pytest.raises(TautError, match="keep or bits"):
            LowBitLinear.parse({"bits": 4}, 0.5)
        with pytest.raises(TautError, match="not finite"):
            fitted(6, 8, bits=4).assign(torch.full((6, 8), torch.inf))
        with pytest.raises(TautError, match="use bits: 8"):
            fitted(6, 8, bits=4).assign(normal(6, 8) * 1e9)

    def test_casts_and_copies(self) -> None:
        part = fitted(70, 48, seen(48), bits=4, activations="fp8")
        twin = copy.deepcopy(part).half()
        assert torch.equal(twin.weight, part.weight)
        assert torch.equal(twin.input_range, part.input_range)
        x = normal(4, 48)
        assert torch.allclose(twin(x.half()).float(), part(x), atol=0.5)
        assert "bits=4" in repr(part)
