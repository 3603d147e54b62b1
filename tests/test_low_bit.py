"""The low-bit methods: exact costs, healing, and that fast paths compute what the plain formulas say."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from taut.core.errors import TautError
from taut.core.site import LinearSite, TableSite
from taut.kernels import int8_linear
from taut.methods.embedding.low_bit import LowBitEmbedding
from taut.methods.linear.low_bit import LowBitLinear
from taut.methods.part import Calibration

CPU = torch.device("cpu")
NOTHING = Calibration()


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


class TestTable:
    KNOBS = [
        *({}, {"symmetric": True}, {"group": 16}, {"bits": 4}, {"bits": 4, "group": 8, "symmetric": True}),
        *({"bits": 6}, {"bits": 3, "group": 10}, {"bits": 2, "clip": True}),
        *({"bits": 4, "number": number} for number in ("nf4", "mxfp4", "nvfp4")),
        {"bits": 4, "number": "fp4", "clip": True},
    ]

    @pytest.mark.parametrize("knobs", KNOBS, ids=str)
    def test_predicted_is_stored(self, knobs: dict) -> None:
        method, site = LowBitEmbedding.parse(knobs), table_site(heads=("lm_head",))
        part = method.build(site, torch.device("meta"), torch.float32)
        cost, state = method.predict(site), table(knobs).state_dict()
        assert {name: one.shape for name, one in state.items()} == {k: v.shape for k, v in part.state_dict().items()}
        stored = save(state)
        assert cost.bytes == len(stored) - 8 - int.from_bytes(stored[:8], "little")
        assert (cost.parameters, cost.flops_per_token) == (40 * 48, 2 * 40 * 48)
        assert part.weight.dim() == 3

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
        site, wanted = table_site(), {1.0: 8, 0.3: 8, 0.29: 6, 0.2: 4, 0.14: 3, 0.09: 2}
        assert {keep: LowBitEmbedding.parse({}, keep).solve(site, keep).bits for keep in wanted} == wanted
        with pytest.raises(TautError, match=r"the least is 0\.08333"):
            LowBitEmbedding.parse({}, 0.08).solve(site, 0.08)
        assert LowBitEmbedding.parse({"number": "nf4"}, 0.2).solve(site, 0.2).bits == 4
        with pytest.raises(TautError, match=r"the least is 0\.1354"):
            LowBitEmbedding.parse({"number": "nf4"}, 0.1).solve(site, 0.1)

    @pytest.mark.parametrize(
        ("knobs", "reason"),
        [
            ({"group": 96}, "group 96 is wider than the table, 48"),
            ({"number": "nf4"}, "number: nf4 needs bits: 4, not 8"),
            ({"number": "fp4", "bits": 4, "symmetric": True}, "centred on zero by itself"),
            ({"number": "mxfp4", "bits": 4, "group": 16}, "groups of 32 by definition, not 16"),
            ({"number": "nvfp4", "bits": 4, "group": 32}, "groups of 16 by definition, not 32"),
        ],
    )
    def test_what_does_not_fit_is_refused_in_words(self, knobs: dict, reason: str) -> None:
        assert reason in LowBitEmbedding.parse(knobs).fits(table_site())
        assert LowBitEmbedding.parse({"bits": 3, "group": 11}).fits(table_site(width=47)) is None

    def test_fewer_bits_err_more(self) -> None:
        weight = normal(40, 48)
        errors = [(table({"bits": bits}, weight).merged() - weight).norm().item() for bits in (8, 6, 4, 3, 2)]
        assert all(3.0 < after / before < 5 for before, after in itertools.pairwise(errors[:3]))
        assert errors == sorted(errors)

    @pytest.mark.parametrize("knobs", KNOBS, ids=str)
    def test_a_lookup_needs_no_more_than_its_batch(self, knobs: dict) -> None:
        """No operation gives anything the size of the table, whatever the table's size."""
        part, ids = table(knobs, normal(4000, 48)), torch.tensor([[7, 3999, 7, 0]])
        part(ids)  # What is the same for every lookup is made once.
        with Largest() as seen:
            part(ids)
        assert 4 * 48 * 4 <= seen.bytes <= 16 * 4 * 48 * 4

    @pytest.mark.parametrize("knobs", KNOBS, ids=str)
    def test_loosened_is_what_it_will_be(self, knobs: dict) -> None:
        weight = normal(40, 48)
        part, ids = table(knobs, weight, scale=2.0, padding_row=3), torch.arange(40).view(5, 8)
        names = {name: (one.shape, one.dtype) for name, one in part.state_dict().items()}
        before = part.merged()
        # The scale that LLM-FP4's search found need not be among those it tries on what it made.
        for original, slack in ((weight, 2e-6), (None, 0.2 if knobs.get("number") == "fp4" else 2e-6)):
            part.loosen(original)
            assert [name for name, _ in part.named_parameters()] == ["weight_loose"]
            vectors, scores = part(ids), part.logits(normal(2, 48))
            (gradient,) = torch.autograd.grad(vectors.sum(), part.weight_loose)
            expected = torch.full((40, 48), 2.0)
            expected[3] = 0
            assert torch.equal(gradient, expected)
            part.tighten()
            assert torch.allclose(part(ids), vectors, atol=2e-6)
            assert torch.allclose(part.logits(normal(2, 48)), scores, atol=1e-4)
            assert not list(part.parameters())
            assert {name: (one.shape, one.dtype) for name, one in part.state_dict().items()} == names
            assert torch.allclose(part.merged(), before, atol=slack)

    @pytest.mark.parametrize("knobs", [{"bits": 3}, {"bits": 2, "group": 16}, {"bits": 4, "number": "nvfp4"}], ids=str)
    def test_healing_lowers_the_loss(self, knobs: dict) -> None:
        """Trained towards the answers of a map of other vectors, the tightened table has followed."""
        part, target = table(knobs), normal(40, 48, seed=5)
        weigh, ids = normal(48, 3, seed=6), torch.arange(40)

        def loss() -> Tensor:
            return ((part(ids) - target) @ weigh).square().mean()

        before = float(loss())
        part.loosen()
        optimiser = torch.optim.Adam(part.parameters(), lr=0.05)
        for _ in range(60):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
        part.tighten()
        assert float(loss()) < 0.1 * before

    def test_refuses_other_sites_and_knobs(self) -> None:
        assert "not a token table" in LowBitEmbedding.parse({}).fits(line(4, 4))
        with pytest.raises(TautError, match="bits = 5"):
            LowBitEmbedding.parse({"bits": 5})
        with pytest.raises(TautError, match="keep or bits"):
            LowBitEmbedding.parse({"bits": 4}, 0.5)


class Largest(TorchDispatchMode):
    """``bytes``: of the largest tensor that anything computed, views aside."""

    bytes = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        answer = operator(*args, **(kwargs or {}))
        if isinstance(answer, Tensor) and not operator.is_view:
            self.bytes = max(self.bytes, answer.nbytes)
        return answer


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
