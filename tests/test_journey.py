"""One journey, prepared once: a trial and ``apply`` open one skeleton and make one plan, which is the model's own."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from transformers import PreTrainedModel

import taut
from taut.architectures.locate import locate
from taut.contract.tiny import FAMILIES, tiny
from taut.core.spec import TrialSpec
from taut.studies.trial import Trial
from taut.surgery.loading import open_model, open_skeleton, resolve
from taut.surgery.plan import Plan

RECIPE = {"embedding": {"method": "low_rank", "keep": 0.5}, "feedforward": {"method": "low_bit"}}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How many skeletons and plans were made, by whatever way."""
    counts: Counter = Counter()
    build, begin = PreTrainedModel._from_config.__func__, Plan.__init__

    def from_config(cls: type, *arguments: object, **options: object) -> PreTrainedModel:
        counts["skeletons"] += torch.get_default_device().type == "meta"
        return build(cls, *arguments, **options)

    def init(self: Plan, *arguments: object, **options: object) -> None:
        counts["plans"] += 1
        begin(self, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "_from_config", classmethod(from_config))
    monkeypatch.setattr(Plan, "__init__", init)
    return counts


@pytest.mark.parametrize("heal", [0, 1])
def test_a_trial(made: Counter, tmp_path: Path, heal: int) -> None:
    folder = tiny_folder(tmp_path / "llama")
    tasks = ({"name": "docs_retrieval", "limit": 4, "max_length": 16},)
    spec = TrialSpec(
        study="one", model=str(folder), recipe_name="light", recipe=RECIPE, heal=heal, tasks=tasks, text="builtin"
    )
    trial = Trial(spec)
    assert trial.reason is None
    assert trial.estimate()["bytes"] > 0
    record = trial.run(lambda text: None)
    assert record.status == "done"
    assert len(record.plan) == 7
    assert made == {"skeletons": 1, "plans": 1}


def test_apply(made: Counter, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "llama")
    taut.apply(folder, RECIPE, tmp_path / "light")
    assert made == {"skeletons": 1, "plans": 1}
    taut.apply(folder, RECIPE, tmp_path / "healed", heal=1)
    assert made == {"skeletons": 2, "plans": 2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_skeleton_has_the_sites_of_the_model(tmp_path: Path, family: str, dtype: torch.dtype | None) -> None:
    """A plan made on the skeleton holds for the model that is opened after it."""
    tiny(family, dtype=torch.bfloat16).save_pretrained(tmp_path)
    source = resolve(tmp_path)
    skeleton, model = open_skeleton(source, dtype), open_model(source, dtype)
    assert skeleton.dtype == model.dtype == (dtype or torch.bfloat16)
    assert locate(skeleton).sites == locate(model).sites


def test_a_folder_whose_config_names_no_dtype(tmp_path: Path) -> None:
    """The weights say it, as transformers has it."""
    tiny("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("\n".join(line for line in config.read_text().split("\n") if '"dtype"' not in line))
    source = resolve(tmp_path)
    assert source.dtype == torch.bfloat16
    assert open_model(source).dtype == torch.bfloat16
