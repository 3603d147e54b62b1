"""``store:`` nests once: factors in few bits are unpacked for training and repacked."""

import pytest
import torch

from taut.contract.tiny import tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.site import TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.low_rank import LowRankEmbedding
from taut.methods.store import Store, stored_bytes
from taut.surgery.apply import apply
from taut.surgery.plan import make_plan

SITE = TableSite(slot="embedding", path="table", rows=90, width=24, heads=("head",), padding_row=3)


def fitted(dtype: torch.dtype = torch.float64, **knobs):
    method = LowRankEmbedding.parse({"rank": 12, **knobs})
    torch.manual_seed(0)
    weight = torch.randn(SITE.rows, SITE.width, dtype=dtype)
    part = method.build(SITE, torch.device("cpu"), dtype)
    method.fit(part, weight, Calibration())
    return method, part, weight


@pytest.mark.parametrize("bits", [8, 6, 4, 3, 2])
@pytest.mark.parametrize("shape", [(5, 7, 12), (9, 13), (1, 1)])
def test_bytes_are_those_of_the_packed_tensor(bits: int, shape: tuple[int, ...]) -> None:
    for group in (None, 5, 64):
        store = Store(bits=bits, group=group)
        value = torch.randn(shape)
        packed = store.pack(value)
        assert packed.shape == store.packed_shape(shape)
        assert packed.nbytes == store.bytes(shape) == stored_bytes(shape, store, 4)
        again = store.unpack(packed, shape, torch.float32)
        assert again.shape == shape
        rows = store.lookup(packed, torch.tensor([0]), shape[-1], torch.float32)
        torch.testing.assert_close(rows[0], again.reshape(-1, shape[-1])[0])
    assert stored_bytes(shape, None, 4) == value.nbytes


def test_more_bits_are_nearer() -> None:
    value = torch.randn(50, 32)
    errors = [
        (Store(bits=bits).unpack(Store(bits=bits).pack(value), (50, 32), torch.float32) - value).norm()
        for bits in (8, 6, 4, 3, 2)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.01 * value.norm()


def test_the_gradient_passes_straight_through() -> None:
    store = Store(bits=3)
    value = torch.randn(4, 8, requires_grad=True)
    stored = store.straight_through(value)
    torch.testing.assert_close(stored, store.unpack(store.pack(value.detach()), (4, 8), torch.float32))
    stored.backward(weight := torch.randn(4, 8))
    assert torch.equal(value.grad, weight)


def test_a_part_unpacks_and_repacks_to_itself() -> None:
    method, part, _ = fitted(torch.float32, store={"bits": 8})
    before = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    ids = torch.arange(SITE.rows)
    answer, scores = part(ids), part.logits(torch.eye(SITE.width))
    assert not list(part.parameters())
    part.unpack()
    assert {name for name, _ in part.named_parameters()} == {"weight_unpacked", "projection_unpacked"}
    torch.testing.assert_close(part(ids), answer, atol=2e-2, rtol=0)
    torch.testing.assert_close(part.logits(torch.eye(SITE.width)), scores, atol=2e-2, rtol=0)
    unpacked = part(ids)
    part.repack()
    torch.testing.assert_close(part(ids), unpacked, atol=1e-5, rtol=0)
    assert {name: tensor.shape for name, tensor in part.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert sum(tensor.nbytes for tensor in part.state_dict().values()) == method.predict(SITE).bytes
    part.repack()
    torch.testing.assert_close(part(ids), unpacked, atol=1e-5, rtol=0)


def test_training_an_unpacked_part_helps_once_it_is_repacked() -> None:
    _, part, weight = fitted(torch.float32, store={"bits": 4})
    target = 1.5 * weight
    error = (part.merged() - target).square().mean()
    part.unpack()
    optimizer = torch.optim.Adam(part.parameters(), 3e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (part(torch.arange(SITE.rows)) - target).square().mean().backward()
        optimizer.step()
    assert part.weight_unpacked.grad[3].abs().max() == 0, "the padding row receives no gradient"
    part.repack()
    assert (part.merged() - target).square().mean() < 0.95 * error


def test_keep_counts_the_stored_bytes() -> None:
    for keep in (0.2, 0.3, 0.4):
        dense = LowRankEmbedding.parse({}, keep).solve(SITE, keep)
        stored = LowRankEmbedding.parse({"store": {"bits": 4}}, keep).solve(SITE, keep)
        assert stored.knobs.rank > dense.knobs.rank
        assert stored.predict(SITE).bytes <= keep * SITE.dense().bytes


def test_a_store_in_a_recipe_survives_the_plan() -> None:
    model = tiny("bert")
    recipe = Recipe.parse({"embedding": {"method": "low_rank", "rank": 8, "store": {"method": "low_bit", "bits": 4}}})
    plan = make_plan(model, recipe)
    assert plan.steps[0].method.knobs.store == Store(bits=4)
    assert plan.steps[0].to_dict()["knobs"]["store"]["bits"] == 4
    apply(model, recipe)
    table = model.get_input_embeddings()
    assert {tensor.dtype for tensor in table.state_dict().values()} == {torch.uint8}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"method": "low_bit", "store": {"method": "low_bit"}}, "does not nest a store"),
        ({"method": "low_rank", "rank": 8, "store": {"method": "low_rank"}}, "store.method = 'low_rank'"),
        ({"method": "low_rank", "rank": 8, "store": {"method": "low_bit", "bits": 5}}, "store.bits = 5"),
        ({"method": "low_rank", "rank": 8, "store": {"method": "low_bit", "bit": 4}}, "store.bit"),
        ({"method": "low_rank", "rank": 8, "store": {"method": "low_bit", "keep": 0.1}}, "keep"),
    ],
)
def test_wrong_stores(line: dict, words: str) -> None:
    with pytest.raises(TautError, match=words):
        make_plan(tiny("bert"), Recipe.parse({"embedding": line}))
