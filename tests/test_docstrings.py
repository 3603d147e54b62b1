"""The docstrings of the public functions: their sections, the parameters they name, and their examples, which run."""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import taut
from taut.api import models, studies, text, vectors

# From their modules: taut.methods is also a package, once something of it is imported.
FUNCTIONS = {
    name: function
    for module in (models, studies, text, vectors)
    for name, function in vars(module).items()
    if name in dir(taut) and inspect.isfunction(function)
}
SECTIONS = ("Parameters", "Returns", "Raises", "Examples")


def test_every_function_is_here() -> None:
    assert {"plan", "apply", "evaluate", "compare", "vectors"} <= FUNCTIONS.keys()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_sections_name_every_parameter(name: str) -> None:
    function = FUNCTIONS[name]
    content = inspect.getdoc(function) or ""
    places = [content.find(f"\n\n{section}\n{'-' * len(section)}\n") for section in SECTIONS]
    assert -1 not in places
    assert places == sorted(places)
    lines = content[places[0] : places[1]].splitlines()[4:]
    heads = [line.split(" : ")[0].lstrip("*") for line in lines if re.match(r"[\w*]", line)]
    assert [word for head in heads for word in head.split(", ")] == list(inspect.signature(function).parameters)
    raised = content[places[2] : places[3]].splitlines()[4]
    assert raised == "TautError"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (test,) = doctest.DocTestFinder(recurse=False).find(FUNCTIONS[name], name, globs={"taut": taut})
    assert test.examples
    runner = doctest.DocTestRunner(verbose=False)
    report: list[str] = []
    runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)
