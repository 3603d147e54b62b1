"""Attention in sections is the formula under the same mask, wherever it is used."""

import pytest
import torch
from decoding import install
from torch import Tensor

from taut.contract.tiny import inputs, logits, stepwise, tiny
from taut.methods.memory.anchor.cache import AnchorCache, Anchoring, Segments
from taut.methods.memory.anchor.method import Anchor
from taut.ops.attention import blocked, sections
from taut.ops.attention.masks import WHOLE, View
from taut.ops.caches.base import Incoming

CPU = torch.device("cpu")
ANCHORS = tuple(range(12))
WAYS = {
    "ids": Anchoring(ANCHORS),
    "bounded": Anchoring(ANCHORS, 5),
    "every": Anchoring((), 4),
    "source": Anchoring(ANCHORS, 0, tuple(range(12, 30))),
    "none": Anchoring((96,)),
}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny inputs get several blocks and go through them, whatever it costs."""
    monkeypatch.setattr(blocked, "CPU_ROWS", 4)
    monkeypatch.setattr(sections, "WORTH", 9.0)


def text(batch: int, length: int, pads: tuple[int, ...] = (), seed: int = 0) -> Incoming:
    ids = torch.randint(96, (batch, length), generator=torch.Generator().manual_seed(seed))
    real = torch.ones(batch, length, dtype=torch.bool)
    for row, count in enumerate(pads):
        real[row, :count] = False
    starts = torch.tensor(pads) if any(pads) else None
    return Incoming(length, CPU, ids, real if any(pads) else None, starts)


def view_of(anchoring: Anchoring, incoming: Incoming) -> View:
    marks, _ = anchoring.marks(incoming, anchoring.start(incoming))
    length = incoming.queries
    return View(
        len(marks), length, length, 0, 0, True, incoming.real, incoming.starts, pattern=Segments(), marks=(marks, marks)
    )


def check(view: View, query: Tensor, key: Tensor, value: Tensor, rows: int) -> sections.SectionPlan:
    """Values and gradients, in float64."""
    plan = sections.plan(view, CPU, rows)
    ours = sections.attend(query, key, value, view, plan, scaling=0.7)
    allowed = view.block(WHOLE, WHOLE, CPU)
    seen = allowed.any(-1)[:, 0, :, None, None]
    formula = blocked.reference(query, key, value, allowed, scaling=0.7)
    assert ours.isfinite().all()
    assert (ours - formula).mul(seen).abs().max() <= 1e-12
    direction = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * seen
    gradients, expected = (torch.autograd.grad((out * direction).sum(), (query, key, value)) for out in (ours, formula))
    assert all((a - b).abs().max() <= 1e-12 for a, b in zip(gradients, expected, strict=True))
    return plan


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("pads", [(0, 0, 0), (0, 3, 26)], ids=["whole", "padded"])
@pytest.mark.parametrize(("groups", "rows"), [(1, 8), (3, 16)])
def test_kernel_is_the_formula(
    name: str, pads: tuple[int, ...], groups: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sections, "WORTH", 9.0)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, 70, 6, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads in (2 * groups, 2, 2)
    )
    view = view_of(WAYS[name], text(3, 70, pads))
    plan = check(view, query, key, value, rows)
    assert sum(block.pairs for block in plan.blocks) <= 70 * (70 + rows + blocked.ALIGNMENT)


def test_what_is_computed_grows_with_sections_and_anchors_alone() -> None:
    """Sections of 16: of 4,096 tokens a block of 64 looks at about 64 + 16 and at one in 16 of the older ones."""
    plan = sections.plan(view_of(Anchoring((), 16), text(2, 4096)), CPU)
    assert sum(block.pairs for block in plan.blocks) <= 4096 * (4096 / 16 / 2 + 64 + 2 * 16)
    assert sections.plan(view_of(Anchoring((), 16), text(2, 60)), CPU) is None, "one block"
    assert sections.plan(view_of(WAYS["none"], text(2, 100)), CPU) is None, "one section, and hardly two blocks"


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("pads", [(0, 0), (0, 9)], ids=["whole", "padded"])
def test_behind_a_cache(name: str, pads: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows hold unequal numbers of entries, and empty ones between those and the new tokens."""
    monkeypatch.setattr(sections, "WORTH", 9.0)
    cache = AnchorCache(1, WAYS[name])
    first, then = text(2, 30, pads), text(2, 40, (), seed=1)
    then = Incoming(40, CPU, then.ids, None, first.starts)
    generator = torch.Generator().manual_seed(0)
    cache.begin(first)
    cache.layers[0].update(*(torch.randn(2, 2, 30, 6, dtype=torch.float64, generator=generator) for _ in range(2)))
    cache.finish()
    cache.begin(then)
    new = (torch.randn(2, 2, 40, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    key, value = (states.detach().requires_grad_() for states in cache.layers[0].update(*new))
    query = torch.randn(2, 2, 40, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    view = View(
        *(2, 40, key.shape[2], 30, 0, True),
        starts=first.starts,
        key_positions=cache.key_positions,
        pattern=Segments(),
        marks=cache.marks,
    )
    check(view, query, key, value, 8)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("family", ["gpt2", "llama", "bart"])
def test_models_use_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, packed sequences, a padded batch and a prompt in pieces; a mask of all pairs would be the same."""
    method = Anchor.parse({"ids": ANCHORS, "longest": 7})
    model = tiny(family, dtype=torch.float64)
    install(model, method)
    batch = inputs(model, length=40)
    packed = batch | {"position_ids": torch.cat([torch.arange(25), torch.arange(15)])[None].expand(2, -1)}
    del packed["attention_mask"]
    padded = {name: tensor.clone() for name, tensor in batch.items()}
    padded["attention_mask"][0, :11] = 0
    calls = []
    whole = sections.attend
    monkeypatch.setattr(sections, "attend", lambda *args, **kwargs: calls.append(1) or whole(*args, **kwargs))

    def answers() -> list[Tensor]:
        outputs = [logits(model, **batch, use_cache=False), stepwise(model, [21, 1, 18], **batch)[0]]
        if family != "bart":
            outputs += [logits(model, **packed, use_cache=False), logits(model, **padded, use_cache=False)[:, 11:]]
        return outputs

    ours = answers()
    assert calls
    monkeypatch.setattr(sections, "WORTH", 0.0)
    calls.clear()
    assert all((a - b).abs().max() <= 1e-12 for a, b in zip(ours, answers(), strict=True))
    assert not calls
