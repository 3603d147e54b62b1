"""Low-bit token tables: exact costs, healing, and that fast paths compute what the plain formulas say."""

import copy
import itertools

import pytest
import torch
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from taut.core.errors import TautError
from taut.core.site import LinearSite, TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.low_bit import LowBitEmbedding

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
            ({"number": "fp4", "bits": 4, "symmetric": True}, "always centred on zero"),
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
    def test_unpacked_is_what_it_will_be(self, knobs: dict) -> None:
        weight = normal(40, 48)
        part, ids = table(knobs, weight, scale=2.0, padding_row=3), torch.arange(40).view(5, 8)
        names = {name: (one.shape, one.dtype) for name, one in part.state_dict().items()}
        before = part.merged()
        # The scale that LLM-FP4's search found need not be among those it tries on what it made.
        for original, tolerance in ((weight, 2e-6), (None, 0.2 if knobs.get("number") == "fp4" else 2e-6)):
            part.unpack(original)
            assert [name for name, _ in part.named_parameters()] == ["weight_unpacked"]
            vectors, scores = part(ids), part.logits(normal(2, 48))
            (gradient,) = torch.autograd.grad(vectors.sum(), part.weight_unpacked)
            expected = torch.full((40, 48), 2.0)
            expected[3] = 0
            assert torch.equal(gradient, expected)
            part.repack()
            assert torch.allclose(part(ids), vectors, atol=2e-6)
            assert torch.allclose(part.logits(normal(2, 48)), scores, atol=1e-4)
            assert not list(part.parameters())
            assert {name: (one.shape, one.dtype) for name, one in part.state_dict().items()} == names
            assert torch.allclose(part.merged(), before, atol=tolerance)

    @pytest.mark.parametrize("knobs", [{"bits": 3}, {"bits": 2, "group": 16}, {"bits": 4, "number": "nvfp4"}], ids=str)
    def test_healing_lowers_the_loss(self, knobs: dict) -> None:
        """Trained towards the answers of a map of other vectors, the compressed table has followed."""
        part, target = table(knobs), normal(40, 48, seed=5)
        weigh, ids = normal(48, 3, seed=6), torch.arange(40)

        def loss() -> Tensor:
            return ((part(ids) - target) @ weigh).square().mean()

        before = float(loss())
        part.unpack()
        optimiser = torch.optim.Adam(part.parameters(), lr=0.05)
        for _ in range(60):
            optimiser.zero_grad()
            loss().backward()
            optimiser.step()
        part.repack()
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
