"""Healing block by block: what learns, what a block is asked for, an original on disk, and going on after a cut."""

import copy
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from torch import Tensor
from transformers import PreTrainedModel

import taut
from taut import data
from taut.contract.tiny import inputs, tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.healing.heal import heal
from taut.healing.layerwise import blocks_of
from taut.healing.unpack import originals
from taut.methods.part import Part
from taut.surgery.apply import apply
from taut.surgery.loading import open_model, resolve

RECIPE = {"feedforward": {"method": "low_rank", "rank": 12, "layers": ":"}}


def pair(family: str = "llama", recipe: dict = RECIPE) -> tuple[PreTrainedModel, PreTrainedModel, list[dict]]:
    original = tiny(family)
    model = copy.deepcopy(original)
    apply(model, Recipe.parse(recipe))
    return model, original, [inputs(model, 6, 10, seed=seed) for seed in range(3)]


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_blocks_come_nearer_to_the_original(family: str) -> None:
    model, original, batches = pair(family)
    before = bits(model)
    facts = taut.heal(model, original, batches=batches, steps=20, by="layer")
    assert facts["by"] == "layer"
    assert facts["loss_last"] < facts["loss_first"]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    parts = {path for path, module in model.named_modules() if isinstance(module, Part)}
    assert {name.rpartition(".")[0] for name in changed} == parts


def test_a_block_is_asked_for_what_the_originals_block_gave() -> None:
    """With nothing but the last block exchanged, healing by layer lowers just the error of that block's output."""
    model, original, batches = pair(recipe={"feedforward": {"method": "low_rank", "rank": 12, "layers": "-1:"}})
    untouched, last = [model.get_submodule(path) for path in blocks_of(original)]
    before = copy.deepcopy(untouched.state_dict())

    def error() -> float:
        answers: list[Tensor] = []
        for net in (model, original):
            block = net.get_submodule(blocks_of(original)[-1])
            hook = block.register_forward_hook(lambda module, args, output: answers.append(output))
            with torch.no_grad():
                net(**batches[0])
            hook.remove()
        student, teacher = (answer[0] if isinstance(answer, tuple) else answer for answer in answers)
        return float((student - teacher).square().mean())

    first = error()
    taut.heal(model, original, batches=batches[:1], steps=40, by="layer")
    assert error() < 0.5 * first
    assert all(torch.equal(tensor, before[name]) for name, tensor in untouched.state_dict().items())
    assert any(isinstance(module, Part) for module in last.modules())


class Cut(BaseException):
    """As abrupt as a keyboard interrupt."""


def test_a_run_cut_off_in_any_block_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    model, original, batches = pair()
    whole = heal(model, original, (), {"steps": 4, "by": "layer"}, batches=batches)
    expected = bits(model)
    for stop in (3, 6):
        model, original, batches = pair()
        state, seen = tmp_path / f"state-{stop}", []

        def cut(done: int, total: int, stop: int = stop, seen: list[int] = seen) -> None:
            seen.append(done)
            assert total == 8
            if done == stop:
                raise Cut

        choices = {"steps": 4, "by": "layer"}
        with pytest.raises(Cut):
            heal(model, original, (), choices, batches=batches, state=state, seconds=0, progress=cut)
        again: list[int] = []

        def note(done: int, total: int, again: list[int] = again) -> None:
            again.append(done)

        facts = heal(model, original, (), choices, batches=batches, state=state, progress=note)
        assert again == list(range(stop, 9))
        assert facts == whole
        assert same(expected, bits(model))


def test_the_original_may_stay_on_disk(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama")
    source = resolve(folder)
    results = []
    for device in ("cpu", "disk"):
        model = open_model(source)
        apply(model, Recipe.parse(RECIPE))
        original = open_model(source, device=device)
        resting = {parameter.device.type for parameter in original.parameters()}
        assert resting == {"meta" if device == "disk" else "cpu"}
        weights = [weight.clone() for _, weight in originals(model, original)]
        batches = [inputs(model, 6, 10, seed=seed) for seed in range(2)]
        facts = taut.heal(model, original, batches=batches, steps=3, by="layer")
        assert {parameter.device.type for parameter in original.parameters()} == resting, "nothing stays in memory"
        results.append((facts, bits(model), weights))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))


def test_the_command_line_heals_by_layer(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama")
    text = tmp_path / "t.txt"
    text.write_text("\n\n".join(data.paragraphs("python_docstrings", limit=20_000).column(0)))
    taut.apply(folder, RECIPE, tmp_path / "out", text=text, heal={"steps": 2, "by": "layer", "batch": 8})
    assert taut.show(tmp_path / "out")["healed"]["by"] == "layer"


def test_wrong_input_is_one_line() -> None:
    model, original, batches = pair("t5")
    with pytest.raises(TautError, match="one stack of layers; this one has encoder and decoder"):
        taut.heal(model, original, batches=batches, steps=2, by="layer")
    model, original, batches = pair(recipe={"embedding": {"method": "low_rank", "rank": 8}})
    before = bits(model)
    with pytest.raises(TautError, match="no block holds anything that learns"):
        taut.heal(model, original, batches=batches, steps=2, by="layer")
    assert same(before, bits(model))
