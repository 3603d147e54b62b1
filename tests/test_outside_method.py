"""A method from a package outside, the one of docs/adding_a_method.md: found, planned, applied, reloaded, checked."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documents import ROOT, files
from folders import tiny_folder

GUIDE = ROOT / "docs" / "adding_a_method.md"
METHOD = "linear.block_diagonal"
RECIPE = {"feedforward": {"method": "block_diagonal", "keep": 0.5}}
APPLY = """
import json, sys
import torch, taut
from safetensors.torch import save_file
from taut.contract.tiny import inputs, logits
from taut.core.registry import METHODS
folder, out, answer = sys.argv[1:]
recipe = json.loads(sys.stdin.read())
plan = taut.plan(folder, recipe)
model = taut.apply(folder, recipe, out)
save_file({"answer": logits(model, **inputs(model))}, answer)
print(json.dumps({
    "listed": METHODS.ids("linear"),
    "planned": sorted({step.method.id for step in plan.steps}),
    "bytes": [plan.before.bytes, plan.after.bytes],
    "parts": sum(type(module).__module__ == "taut_block_diagonal" for module in model.modules()),
}))
"""
REOPEN = """
import json, sys
import torch, taut
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from taut.contract.tiny import inputs, logits
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(json.dumps(torch.equal(logits(model, **inputs(model)), load_file(sys.argv[2])["answer"])))
"""
CHECK = """
import json, sys, taut
print(json.dumps(taut.check(sys.argv[1], ["llama"], {"keep": 0.5})))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip would leave it: the module, and the metadata that names its entry point."""
    folder = tmp_path_factory.mktemp("site")
    written = files(GUIDE)
    (folder / "taut_block_diagonal.py").write_text(written["taut_block_diagonal.py"])
    project = tomllib.loads(written["pyproject.toml"])["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = project["entry-points"]["taut.methods"]
    lines = ["[taut.methods]", *(f"{name} = {target}" for name, target in points.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def compressed(package: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder that needs the method, made in a process of its own, and what that process reported."""
    folder = tmp_path_factory.mktemp("models")
    llama = tiny_folder(folder / "llama")
    done = python(APPLY, package, llama, folder / "out", folder / "answer", stdin=json.dumps(RECIPE))
    assert done.returncode == 0, done.stderr
    return folder, last(done)


def python(code: str, package: Path | None, *words: object, stdin: str = "") -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if package is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True)


def last(done: subprocess.CompletedProcess) -> dict | list | bool:
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_found_planned_and_applied(compressed: tuple[Path, dict]) -> None:
    report = compressed[1]
    assert METHOD in report["listed"]
    assert report["planned"] == [METHOD]
    before, after = report["bytes"]
    assert after == before // 2
    assert report["parts"] == 6


def test_reopens_to_the_bit_in_another_process(package: Path, compressed: tuple[Path, dict]) -> None:
    folder, _ = compressed
    done = python(REOPEN, package, folder / "out", folder / "answer")
    assert done.returncode == 0, done.stderr
    assert last(done) is True


def test_without_the_package_the_folder_says_what_is_missing(compressed: tuple[Path, dict]) -> None:
    folder, _ = compressed
    done = python(REOPEN, None, folder / "out", folder / "answer")
    assert done.returncode != 0
    assert "unknown linear method 'block_diagonal'" in done.stderr


def test_keeps_the_contract(package: Path) -> None:
    done = python(CHECK, package, METHOD)
    assert done.returncode == 0, done.stderr
    rows = last(done)
    assert [row for row in rows if row["status"] != "passed"] == []
    assert len(rows) == len({row["check"] for row in rows}) > 10
