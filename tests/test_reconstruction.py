"""Training on what attention misses of compressed entries: `reconstruction:` of a training spec."""

from pathlib import Path

import pytest
import torch
from runs import small
from test_train import Cut, cut_at, same, weights

import taut
from taut.contract.tiny import inputs, tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.surgery.apply import apply
from taut.training.objective import LanguageModelling
from taut.training.reconstruction import Reconstruction
from taut.training.run import train

LINE = {"method": "compressive", "segment": 4, "memory": 4, "compressed": 4, "rate": 2, "pool": "conv"}
CONV = {"memory": LINE}


def is_learned(name: str) -> bool:
    return ".taut." in name


def test_a_step_teaches_the_compressor_apart() -> None:
    model = tiny("llama", dtype=torch.float64)
    apply(model, Recipe.parse(CONV))
    ids = inputs(model, length=24)["input_ids"]

    def step(task: LanguageModelling) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = task(ids, ids)["loss"]
        loss.backward()
        return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    tasks = [LanguageModelling(model)]
    tasks += [LanguageModelling(model, reconstruction=Reconstruction.of(model, weight)) for weight in (1.0, 4.0)]
    (plain, own), (loss, once), (_, more) = (step(task) for task in tasks)
    assert loss == plain
    assert any(map(is_learned, own))
    for name, gradient in own.items():
        assert torch.equal(gradient, once[name]) != is_learned(name)
        assert torch.equal(once[name] * (4.0 if is_learned(name) else 1.0), more[name])
        assert more[name].any()


def test_pieces_of_a_step_weigh_by_their_targets() -> None:
    model = tiny("llama", dtype=torch.float64)
    apply(model, Recipe.parse(CONV))
    task = LanguageModelling(model, reconstruction=Reconstruction.of(model, 1.0))
    ids = inputs(model, batch=4, length=24)["input_ids"]
    gradients = []
    for cuts in ((4,), (1, 3)):
        model.zero_grad()
        for rows in ids.split(cuts if sum(cuts) == 4 else 4):
            task(rows, rows, num_items_in_batch=ids.numel())["loss"].backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12, rtol=1e-9) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("carry", [False, True])
def test_a_run_learns_to_reconstruct_and_goes_on(tmp_path: Path, carry: bool) -> None:
    """In streams of one segment, only this loss sees what was compressed in the same batch."""
    length = {"length": 4, "batch": 8} if carry else {"length": 16}
    chosen = {"recipe": CONV, "carry_memory": carry, "save": {"seconds": 0}, "learning_rate": 1e-2, **length}
    spec = small(tmp_path, reconstruction=1.0, **chosen)
    whole = train(spec, tmp_path / "whole")
    with pytest.raises(Cut):
        train(spec, tmp_path / "out", progress=cut_at(5))
    done = train(spec, tmp_path / "out")
    assert done.record["losses"] == whole.record["losses"]
    assert done.record["evaluations"] == whole.record["evaluations"]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert all(entry["reconstruction"] > 0 for entry in done.record["evaluations"])
    learned = {name: tensor for name, tensor in weights(tmp_path / "out").items() if is_learned(name)}
    assert len(learned) == 4
    assert all(tensor.any() for tensor in learned.values())
    assert taut.show(tmp_path / "out")["recipe"] == CONV
    # Without it nothing is asked; with carried memory nothing is learned either.
    plain = train(small(tmp_path, **chosen), tmp_path / "plain")
    assert all("reconstruction" not in entry for entry in plain.record["evaluations"])
    other = weights(tmp_path / "plain")
    assert all(other[name].any() != carry for name in learned)


@pytest.mark.parametrize("recipe", [{}, {"memory": LINE | {"pool": "mean"}}, {"memory": "identity"}])
def test_without_a_compressor_it_is_refused(tmp_path: Path, recipe: dict) -> None:
    with pytest.raises(TautError, match=r"reconstruction = 0\.5: the recipe has no memory that learns to compress"):
        train(small(tmp_path, recipe=recipe, reconstruction=0.5), tmp_path / "out")
    with pytest.raises(TautError, match="reconstruction"):
        train(small(tmp_path, recipe=CONV, reconstruction=-1.0), tmp_path / "out")
