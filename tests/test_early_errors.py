"""Wrong input on the command line is reported before torch is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

WITHOUT = ("torch", "transformers", "numpy", "scipy", "altair")
RUN = f"""\
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name in {WITHOUT}:
            raise RuntimeError(f"{{name}} was imported")

sys.meta_path.insert(0, Refused())
from taut import cli
cli.main()
"""
FILES = {
    "slot.yaml": {"feedforwrd": "low_rank"},
    "method.yaml": {"feedforward": "low_rnk"},
    "knob.yaml": {"feedforward": {"method": "low_rank", "rnk": 8}},
    "stored.yaml": {"feedforward": {"method": "low_rank", "rank": 8, "store": "low_bits"}},
    "study.yaml": {"models": "minilm", "recipess": {}},
    "task.yaml": {"models": "minilm", "recipes": {"one": "table_int8"}, "tasks": "perplxity"},
    "study_knob.yaml": {"models": "minilm", "recipes": {"one": {"embedding": {"method": "low_bit", "bit": 4}}}},
    "study_model.yaml": {"models": "./nowhere", "recipes": {"one": "table_int8"}},
    "train.yaml": {"model": "llama:hidden_size=64", "text": "builtin", "budget": {"stps": 3}},
    "train_model.yaml": {"model": "./nowhere", "text": "builtin", "budget": {"steps": 3}},
    "train_recipe.yaml": {
        "model": "llama:hidden_size=64",
        "text": "builtin",
        "budget": {"steps": 3},
        "recipe": {"feedforward": {"method": "low_rank", "rnk": 8}},
    },
}


def taut(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "TAUT_MODELS"},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("early")
    for name, content in FILES.items():
        (folder / name).write_text(yaml.safe_dump(content))
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "something").touch()
    return folder


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan ./nowhere table_int8", "./nowhere: no such folder"),
        ("plan ./empty table_int8", "empty: no config.json there"),
        ("plan gpt2:n_layer=2 nope.yaml", "nope.yaml: no such recipe file or shipped recipe"),
        ("plan gpt2:n_layer=2 slot.yaml", "slot.yaml: unknown slot 'feedforwrd': did you mean 'feedforward'?"),
        ("plan gpt2:n_layer=2 method.yaml", "method.yaml: feedforward: unknown linear method 'low_rnk'"),
        ("plan gpt2:n_layer=2 knob.yaml", "knob.yaml: feedforward: linear.low_rank has no knob 'rnk'"),
        ("apply gpt2:n_layer=2 knob.yaml --out x", "linear.low_rank has no knob 'rnk': did you mean 'rank'?"),
        ("apply gpt2:n_layer=2 stored.yaml --out x", "feedforward.store: unknown linear method 'low_bits'"),
        ("apply gpt2:n_layer=2 table_int8 --out full", "full: already there and not an empty folder"),
        ("apply gpt2:n_layer=2 table_int8 --out x --dtype float33", "dtype = 'float33': expected float32"),
        ("check embedding.nope", "unknown embedding method 'nope'"),
        ("check low_bit", "method 'low_bit' is one of several: write embedding.low_bit or linear.low_bit or memory"),
        ("check block_dense --knob blcks=2", "check: linear.block_dense has no knob 'blcks': did you mean 'blocks'?"),
        ("compare nostudy.yaml", "nostudy.yaml: cannot read the study"),
        ("compare study.yaml", "study.yaml: unknown key 'recipess': did you mean 'recipes'?"),
        ("compare task.yaml", "task.yaml: tasks: unknown task 'perplxity': did you mean 'perplexity'?"),
        ("compare study_knob.yaml", "recipes.one: embedding: embedding.low_bit has no knob 'bit'"),
        ("compare study_model.yaml", "./nowhere: no such folder"),
        ("compare minilm --recipes lihgt", "lihgt: no recipe file, folder of recipes, shipped set"),
        ("compare minilm --recipes light --task nope", "unknown task 'nope'"),
        ("evaluate gpt2:n_layer=2 --task nope", "unknown task 'nope'"),
        ("evaluate gpt2:n_layer=2 --task sts --option limt=3", "task sts: sts has no option 'limt'"),
        ("evaluate gpt2:n_layer=2 --task sts --dtype float33", "dtype = 'float33'"),
        ("evaluate gpt2:n_layer=2 --task agreement --reference ./nowhere", "./nowhere: no such folder"),
        ("measure gpt2:n_layer=2 --against ./nowhere", "./nowhere: no such folder"),
        ("measure gpt2:n_layer=2 --dtype int8", "dtype = 'int8': expected float32, bfloat16, float16 or float64"),
        ("context gpt2:n_layer=2 ./nowhere", "./nowhere: no such folder"),
        ("train missing.yaml", "missing.yaml: cannot read the training spec"),
        ("train train.yaml", "train.yaml: budget: unknown key 'stps': did you mean 'steps'?"),
        ("train train_model.yaml", "./nowhere: no such folder"),
        ("train train_recipe.yaml", "train_recipe.yaml: recipe: feedforward: linear.low_rank has no knob"),
        ("report nowhere", "nowhere: no records found"),
        ("show nowhere", "nowhere: no config.json there"),
        ("tune ./nowhere", "nowhere: no such folder"),
        ("export ./nowhere --dense --out x", "nowhere: no such folder"),
        ("generate ./nowhere --prompt a", "./nowhere: no such folder"),
        ("prefix ./nowhere --text a --out x", "./nowhere: no such folder"),
        ("index ./nowhere builtin --out x", "./nowhere: no such folder"),
        ("search nowhere words", "nowhere: no index.json found"),
        ("anchor-token ./nowhere --out x", "./nowhere: no such folder"),
        ("methods nope", "unknown kind of method 'nope'"),
    ],
)
def test_wrong_input_imports_no_torch(folder: Path, command: str, message: str) -> None:
    done = taut(folder, *command.split())
    assert done.stderr.startswith("error: "), done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert (done.returncode, done.stdout) == (2, "")
    assert {path.name for path in folder.iterdir()} == {*FILES, "empty", "full"}


def test_the_check_itself_can_fail(folder: Path) -> None:
    assert "was imported" in taut(folder, "plan", "gpt2:n_layer=2", "table_int8").stderr
