"""What memory.compressive learns to compress with: exact however a text is cut, taught by its own loss alone."""

import copy
from pathlib import Path

import pytest
import torch
from decoding import CHUNKS, LENGTH, install
from slow_compression import SLOW, slow_reference
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from taut.architectures.locate import locate
from taut.contract.tiny import inputs, logits, stepwise, tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.site import MemorySite
from taut.generation.prefix import Prefix, read
from taut.methods.memory.compressive.method import Compressive
from taut.methods.memory.segment_recurrence.method import SegmentRecurrence
from taut.ops.caches.pooling import Compressor, attention_error
from taut.surgery.apply import apply, undo

SHAPE = {"segment": 4, "memory": 3, "compressed": 2, "rate": 3}
LINES = {
    "conv": SHAPE | {"pool": "conv"},
    "dilated": SHAPE | {"pool": "dilated"},
    "conv in 8 bits": SHAPE | {"pool": "conv", "store": {"method": "low_bit", "bits": 8}},
    "conv, pairs": {"segment": 1, "memory": 2, "compressed": 3, "rate": 2, "pool": "conv"},
    "dilated, fives": {"segment": 5, "memory": 0, "compressed": 9, "rate": 5, "pool": "dilated"},
}
METHODS = {name: Compressive.parse(line) for name, line in LINES.items()}
EACH = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
TWO = pytest.mark.parametrize("method", [METHODS["conv"], METHODS["dilated"]], ids=["conv", "dilated"])
FIRST = pytest.mark.parametrize("method", list(METHODS.values())[:3], ids=list(METHODS)[:3])


def as_mean(method: Compressive) -> Compressive:
    return Compressive.parse(method.knobs.model_dump() | {"pool": "mean"})


def compressor_of(model: PreTrainedModel) -> Compressor:
    return next(module for module in model.modules() if isinstance(module, Compressor))


def untidy(model: PreTrainedModel, scale: float = 0.3) -> Compressor:
    """The model's compressor, as if it had learned something."""
    compressor, generator = compressor_of(model), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in compressor.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return compressor


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@EACH
def test_equals_the_slow_reference(family: str, method: Compressive) -> None:
    model = tiny(family, dtype=torch.float64)
    ids = inputs(model, length=LENGTH)["input_ids"]
    remove = install(model, method)
    compressor = untidy(model)
    results = [logits(model, input_ids=ids, use_cache=False)]
    results += [stepwise(model, chunks, input_ids=ids)[0] for chunks in CHUNKS.values()]
    remove()
    expected = slow_reference(model, method, ids, compressor)
    plain = slow_reference(model, as_mean(method), ids)
    assert (expected - plain).abs().max() > 1e-3
    assert max((result - expected).abs().max() for result in results) <= 1e-12


@pytest.mark.parametrize("rate", [2, 3, 4, 7, 8])
@pytest.mark.parametrize("pool", ["conv", "dilated"])
def test_pools_of_every_rate(pool: str, rate: int) -> None:
    """A pool sees the whole group and nothing else, and untrained it is the mean, to the bit."""
    made = Compressor(pool, 2, 3, rate, 4, torch.device("cpu"), torch.float64)
    groups = torch.randn(2, 3, 5, rate, 4, generator=torch.Generator().manual_seed(0)).double()
    assert torch.equal(made.pools(1)[0](groups), groups.mean(3))
    weight = made.values[1].weight
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    groups.requires_grad_()
    pooled = made.pools(1)[1](groups)
    slow = torch.stack([SLOW[pool](groups[:, :, group], weight) for group in range(5)], 2)
    assert (pooled - slow).abs().max() <= 1e-12
    (reached,) = torch.autograd.grad((pooled[:, :, 2] - groups.mean(3)[:, :, 2]).square().sum(), groups)
    assert (reached[:, :, 2].abs().amax((0, 1, 3)) > 0).all()
    assert not reached[:, :, [0, 1, 3, 4]].any()


@FIRST
def test_assisted_decoding_and_cropping(method: Compressive) -> None:
    """What is pending is pooled when it is confirmed, after the pass that brought it."""
    model = tiny("llama", dtype=torch.float64)
    install(model, method)
    untidy(model)
    batch, options = inputs(model, batch=1), {"max_new_tokens": 14, "do_sample": False}
    plain, cache = model.generate(**batch, **options), method.cache(2)
    assert torch.equal(plain, model.generate(**batch, **options, prompt_lookup_num_tokens=3, past_key_values=cache))
    ids = inputs(model, length=LENGTH)["input_ids"]
    cache = method.cache(2)
    cache.activate_past_recording()
    stepwise(model, [10, 8], cache, input_ids=ids[:, :18])
    cache.crop(-2)
    assert cache.layers[0].compressed > 0
    rest, _ = stepwise(model, [1, LENGTH - 17], cache, input_ids=ids[:, 16:])
    assert (rest - logits(model, input_ids=ids, use_cache=False)[:, 16:]).abs().max() <= 1e-12


def test_one_into_one_is_a_longer_memory() -> None:
    model = tiny("llama", dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    full = logits(model, **batch)
    remove = install(model, SegmentRecurrence.parse({"segment": 4, "memory": 8}))
    recurrence = logits(model, **batch, use_cache=False)
    remove()
    for compressed, expected in ((5, recurrence), (LENGTH, full)):
        knobs = {"segment": 4, "memory": 3, "compressed": compressed, "rate": 1, "pool": "conv"}
        remove = install(model, Compressive.parse(knobs))
        assert (logits(model, **batch, use_cache=False) - expected).abs().max() <= 1e-12
        assert (stepwise(model, CHUNKS["in pieces"], **batch)[0] - expected).abs().max() <= 1e-12
        remove()


@TWO
def test_untrained_it_is_the_mean(method: Compressive) -> None:
    model = tiny("llama")
    batch = inputs(model, length=LENGTH)
    remove = install(model, Compressive.parse(SHAPE))
    mean = logits(model, **batch)
    remove()
    install(model, method)
    assert torch.equal(logits(model, **batch), mean)


@FIRST
def test_files_copies_and_undo(method: Compressive, tmp_path: Path) -> None:
    model = tiny("llama")
    original, ids = model.state_dict(), inputs(model, batch=1, length=LENGTH)["input_ids"]
    before = logits(model, input_ids=ids)
    apply(model, Recipe.parse({"memory": {"method": "compressive", **method.knobs.model_dump(exclude_none=True)}}))
    untidy(model)
    answer = logits(model, input_ids=ids)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(again, input_ids=ids), answer)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    twin = copy.deepcopy(model)
    read(model, ids[0, :14]).save(tmp_path / "prefix")
    cache = Prefix.load(tmp_path / "prefix", model).cache()
    assert (stepwise(model, [1, 9], cache, input_ids=ids[:, 14:])[0] - answer[:, 14:]).abs().max() <= 1e-4
    with torch.no_grad():
        compressor_of(model).keys[0].weight.zero_()
    assert torch.equal(logits(twin, input_ids=ids), answer)
    assert not torch.equal(logits(model, input_ids=ids), answer)
    undo(model)
    assert torch.equal(logits(model, input_ids=ids), before)
    assert list(model.state_dict()) == list(original)


@EACH
def test_what_is_learned_is_predicted(method: Compressive) -> None:
    model = tiny("llama", dtype=torch.bfloat16)
    site = next(site for site in locate(model).sites if isinstance(site, MemorySite))
    learned = method.learned(site, torch.device("meta"), torch.bfloat16)
    cost = method.predict(site)
    assert cost.parameters == sum(weight.numel() for weight in learned.parameters())
    assert cost.bytes == sum(weight.nbytes for weight in learned.parameters())
    assert all(weight.is_meta for weight in learned.parameters())
    rate, width = method.knobs.rate, site.head_width
    if method.knobs.pool == "conv":
        assert cost.parameters == 2 * site.layers * site.key_heads * rate * width**2
        assert cost.flops_per_token == 4 * site.layers * site.key_heads * width**2
    assert cost.cache_bytes_per_token == as_mean(method).predict(site).cache_bytes_per_token


def reconstruct(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    with compressor_of(model).reconstructing() as errors:
        answer = model(**batch, use_cache=False)["logits"]
    return errors, answer


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
@TWO
def test_reconstruction_reaches_the_compressor_and_nothing_else(family: str, method: Compressive) -> None:
    model = tiny(family, dtype=torch.float64)
    batch = inputs(model, length=LENGTH)
    install(model, method)
    compressor = untidy(model, 0.1)
    mine = {id(weight) for weight in compressor.parameters()}

    def gradients(loss: Tensor) -> dict[str, Tensor | None]:
        model.zero_grad()
        loss.backward()
        return {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        }

    plain = gradients(model(**batch, use_cache=False)["logits"].square().sum())
    errors, answer = reconstruct(model, batch)
    assert len(errors) == len(compressor.keys)
    both = gradients(answer.square().sum() + 4.0 * sum(errors))
    alone = gradients(sum(reconstruct(model, batch)[0]))
    for name, parameter in model.named_parameters():
        if id(parameter) in mine:
            assert plain[name].any()
            assert torch.equal(both[name], 4.0 * alone[name])
        else:
            assert alone[name] is None
            assert plain[name] is both[name] is None or torch.equal(plain[name], both[name])


def test_the_error_is_that_of_the_definition() -> None:
    """By hand: every query, what it makes of the groups behind it, before and after."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 12, 4, generator=generator).double() for heads in (4, 2, 2))
    old = tuple(states.unflatten(2, (4, 3)) for states in (key, value))
    new = tuple(states.amax(3) for states in old)
    last, real = torch.tensor([2, 5, 8, 11]), torch.ones(2, 12, 1, dtype=torch.bool)
    real[1, 9:] = False
    seen = (last < torch.arange(12)[:, None])[None] & real
    total, count = 0.0, 0
    for row in range(2):
        for i in range(12 if row == 0 else 9):
            groups = int((last < i).sum())
            if groups == 0:
                continue
            count += 1
            for head in range(4):
                answers = []
                for keys, values in (old, new):
                    keys = keys[row, head // 2, :groups].reshape(-1, 4)
                    values = values[row, head // 2, :groups].reshape(-1, 4)
                    answers.append((query[row, head, i] @ keys.T * 0.7).softmax(-1) @ values)
                total += float((answers[0] - answers[1]).square().mean()) / 4
    assert float(attention_error(query, old, new, seen, 0.7)) == pytest.approx(total / count, rel=1e-12)
    assert float(attention_error(query, old, new, seen & False, 0.7)) == 0.0


def test_queries_are_asked_about_what_came_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The later a group, the fewer queries it is compared for; a padded row has fewer groups."""
    model = tiny("llama", dtype=torch.float64, num_hidden_layers=1)
    install(model, METHODS["conv"])
    asked: list[tuple[Tensor, Tensor]] = []

    def compare(compressor: Compressor, layer: int, query: Tensor, groups: tuple, seen: Tensor, scaling: float) -> None:
        asked.append((groups[0], seen))

    monkeypatch.setattr(Compressor, "compare", compare)
    batch = inputs(model, length=LENGTH)
    batch["attention_mask"][1, :6] = 0
    reconstruct(model, batch)
    ((groups, seen),) = asked
    assert groups.shape[2:4] == (7, 3)
    # After 24 tokens a segment ends and 21 have left; after 18 the last one ended at 16, so 13 have: 4 whole groups.
    assert seen.sum(1).tolist() == [[21, 18, 15, 12, 9, 6, 3], [15, 12, 9, 6, 0, 0, 0]]


@TWO
def test_it_learns_to_reconstruct(method: Compressive) -> None:
    """Where one token of a group says something and the others never do, less is missed than by the mean."""
    model = tiny("llama")
    install(model, method)

    def text(seed: int) -> dict[str, Tensor]:
        ids = inputs(model, batch=8, length=48, seed=seed)["input_ids"]
        ids[:, 0::3] = ids[:, 1::3] = 7
        return {"input_ids": ids}

    def error(batch: dict[str, Tensor]) -> Tensor:
        return sum(reconstruct(model, batch)[0])

    with torch.no_grad():
        mean = error(text(99))
    adam = torch.optim.Adam(compressor_of(model).parameters(), lr=0.01)
    losses = []
    for step in range(60):
        adam.zero_grad()
        loss = error(text(step))
        loss.backward()
        adam.step()
        losses.append(loss.item())
    with torch.no_grad():
        after = error(text(99))
    print(f"{losses[0]:.4f} -> {losses[-1]:.4f}; held out {mean:.4f} -> {after:.4f}")
    assert losses[-1] < 0.9 * losses[0]
    assert after < 0.95 * mean


def test_what_cannot_be_served_is_told() -> None:
    with pytest.raises(TautError, match=r"pool = 'dilated' needs rate >= 2: a group of one token"):
        Compressive.parse({"pool": "dilated", "rate": 1})
    model = tiny("llama")
    install(model, Compressive.parse(SHAPE))
    with pytest.raises(TautError, match=r"needs a model with a learned pool \(conv\)"):
        model(**inputs(model), past_key_values=METHODS["conv"].cache(2))
