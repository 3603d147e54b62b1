"""taut tune: dense copies answer where they were measured to be faster, and nowhere else."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import tiny_folder
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

import taut
from taut.cli import app
from taut.contract.tiny import inputs, tiny
from taut.core.environment import processor
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.record import Quantity
from taut.methods.part import LinearPart
from taut.surgery import tune
from taut.surgery.apply import apply
from taut.surgery.tune import token_ranges

RECIPE = {
    "feedforward": {"method": "low_rank", "rank": 12, "layers": ":"},
    "projection": {"method": "block_shuffle", "blocks": 2},
}


def compressed() -> PreTrainedModel:
    model = tiny("llama")
    apply(model, Recipe.parse(RECIPE))
    return model


def parts(model: PreTrainedModel) -> dict[str, LinearPart]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LinearPart)}


@pytest.fixture
def slow_at_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which only low rank at four tokens is slower than its copy."""

    def measured(part: LinearPart, tokens: list[int], threads: int) -> list[dict[str, Any]]:
        low_rank = type(part).__name__.startswith("LowRank")
        speeds = {count: 0.5 if low_rank and count == 4 else 2.0 for count in tokens}
        made_up = {count: Quantity(value=speed, unit="", how="made up") for count, speed in speeds.items()}
        return [{"threads": threads, "tokens": count, "speed": speed} for count, speed in made_up.items()]

    monkeypatch.setattr(tune, "measure_part", measured)


def test_ranges_go_to_the_nearest_by_ratio() -> None:
    tried = (1, 2, 4, 8, 16)
    assert token_ranges([4], tried) == ((3, 5),)
    assert token_ranges([1], tried) == ((1, 1),)
    assert token_ranges([16], tried) == ((12, -1),)
    assert token_ranges([2, 4, 16], tried) == ((2, 5), (12, -1))
    assert token_ranges(tried, tried) == ((1, -1),)
    assert token_ranges([], tried) == ()
    covered = [
        next(c for c in tried if any(a <= t and (t <= b or b < 0) for a, b in token_ranges([c], tried)))
        for t in range(1, 40)
    ]
    assert covered == [min(tried, key=lambda c: (abs(torch.tensor(t / c).log().item()), -c)) for t in range(1, 40)]


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 6, 40])
def test_the_copy_answers_in_its_range_alone(tokens: int) -> None:
    model = compressed().double()
    part = model.model.layers[1].mlp.up_proj
    x = torch.randn(1, tokens, part.in_features, dtype=torch.float64)
    with torch.no_grad():
        alone = part(x)
        part.keep_dense_copy({torch.get_num_threads(): ((3, 5),)})
        both = part(x)
        copied = F.linear(x, part.merged(), part.bias)
    assert torch.allclose(both, alone, atol=1e-12)
    assert torch.equal(both, copied if 3 <= tokens <= 5 else alone)
    with torch.no_grad():
        part.copy.zero_()
    answers = [part(x).detach()]
    with torch.no_grad():
        part.keep_dense_copy({torch.get_num_threads() + 1: ((1, -1),)})
        part.copy.zero_()
        answers.append(part(x))
    assert all(torch.allclose(answer, alone) for answer in answers), "gradients and other threads get the map itself"


def test_copies_are_not_saved_and_go_when_the_part_learns() -> None:
    model = compressed()
    before = list(model.state_dict())
    for part in parts(model).values():
        part.keep_dense_copy({1: ((1, -1),)})
    assert list(model.state_dict()) == before
    assert all(part.copy.shape == (part.out_features, part.in_features) for part in parts(model).values())
    model.half()
    assert all(part.copy.dtype == torch.float16 for part in parts(model).values())
    model.train()
    assert all(part.copy is None and not part.dense_ranges for part in parts(model).values())


def test_a_folder_remembers(tmp_path: Path, slow_at_four: None) -> None:
    folder = tmp_path / "compressed"
    taut.apply(tiny_folder(tmp_path / "m", "llama"), RECIPE, folder, text=None)
    weights = (folder / "model.safetensors").read_bytes()
    result = taut.tune(folder, threads=(1, 2))
    assert set(result.copies) == {
        f"feedforward.{layer}.{role}" for layer in range(2) for role in ("gate", "up", "down")
    }
    noted = json.loads((folder / "config.json").read_text())["quantization_config"]["tuned"]
    assert noted["processor"] == processor()
    assert noted["sites"]["feedforward.0.up"] == {"1": [[3, 5]], "2": [[3, 5]]}
    assert (folder / "model.safetensors").read_bytes() == weights
    model = AutoModelForCausalLM.from_pretrained(folder)
    copies = {name for name, part in parts(model).items() if part.dense_ranges}
    assert copies == {name for name in parts(model) if ".mlp." in name}
    assert taut.show(folder)["tuned"] == noted
    # A second save keeps the tuning.
    model.save_pretrained(tmp_path / "again")
    again = taut.load(tmp_path / "again")
    batch = inputs(model, 2, 2)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)
    assert {name for name, part in parts(again).items() if part.dense_ranges} == copies


def test_another_processor_is_another_question(tmp_path: Path, slow_at_four: None) -> None:
    folder = tmp_path / "compressed"
    taut.apply(tiny_folder(tmp_path / "m", "llama"), RECIPE, folder, text=None)
    taut.tune(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["tuned"]["processor"] = "Difference Engine"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="tuned on Difference Engine"):
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert not any(part.dense_ranges for part in parts(model).values())


def test_a_model_in_memory_is_tuned_undone_and_exported(tmp_path: Path, slow_at_four: None) -> None:
    original = tiny("llama")
    model = tiny("llama")
    apply(model, Recipe.parse(RECIPE))
    steps: list[tuple[int, int]] = []
    taut.tune(model, progress=lambda done, total: steps.append((done, total)))
    assert steps[-1][0] == steps[-1][1]
    assert any(part.dense_ranges for part in parts(model).values())
    taut.export(model, tmp_path / "dense")
    taut.undo(model)
    batch = inputs(model, 2, 4)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, original(**batch).logits)


def test_it_measures_for_real(tmp_path: Path) -> None:
    folder = tmp_path / "compressed"
    recipe = {"feedforward": {"method": "low_rank", "rank": 4}}
    taut.apply(tiny_folder(tmp_path / "m", "llama"), recipe, folder, text=None)
    result = CliRunner().invoke(app, ["tune", str(folder), "--threads", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "low_rank rank=4" in result.output
    assert "1024: " in result.output
    noted = json.loads((folder / "config.json").read_text())["quantization_config"]["tuned"]
    assert set(noted) == {"processor", "device", "sites"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        taut.load(folder)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TautError, match="not compressed"):
        taut.tune(tiny("llama"))
    int8 = tiny("llama")
    apply(int8, Recipe.parse({"feedforward": {"method": "low_bit"}}))
    with pytest.raises(TautError, match="no map here has a dense equivalent"):
        taut.tune(int8)
    with pytest.raises(TautError, match="tokens = \\[0\\]"):
        tune.tune(compressed(), tokens=(0,))
    with pytest.raises(TautError, match="needs a compressed folder"):
        taut.tune("llama:hidden_size=64")
