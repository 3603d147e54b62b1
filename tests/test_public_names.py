"""``import taut``: what it offers, and what it does not load."""

import ast
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import taut

API = Path(taut.__file__).parent / "api"


def _output(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_names_are_the_public_functions_of_the_api() -> None:
    helpers = {"use_threads", "check_models", "check_out", "read_dtype", "read_recipe", "read_texts"}
    helpers |= {"data_names", "model_names"}
    trees = [ast.parse(path.read_text()) for path in API.glob("*.py")]
    functions = {node.name for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)}
    public = {name for name in functions if not name.startswith("_")} - helpers
    assert public <= set(dir(taut))
    assert {"TautError", "apply", "evaluate", "methods", "plan", "vectors"} <= set(dir(taut))
    assert [name for name in dir(taut) if name.startswith("_")] == []


def test_every_name_can_be_imported_and_is_no_module() -> None:
    for name in dir(taut):
        assert name in taut.__all__
        assert callable(getattr(taut, name)), name
    assert taut.__version__ == version("taut")


def test_names_load_without_torch() -> None:
    program = (
        "import sys, taut; [getattr(taut, name) for name in dir(taut)]; print({'torch', 'numpy'} & {*sys.modules})"
    )
    assert _output(program) == "set()"


def test_a_mistyped_name_is_corrected() -> None:
    with pytest.raises(AttributeError, match="module 'taut' has no attribute 'plann': did you mean 'plan'"):
        _ = taut.plann


@pytest.mark.parametrize("order", ["before", "after"])
def test_methods_is_a_verb_and_a_package(order: str) -> None:
    call, load = "print(len(taut.methods('memory')))", "import taut.methods.base as base; print(base.Method.__name__)"
    first, second = (call, load) if order == "before" else (load, call)
    count = sum(1 for path in (API.parent / "methods" / "memory").iterdir() if not path.name.startswith("_"))
    printed = _output(f"import taut; {first}; {second}; {call}").splitlines()
    assert sorted(printed) == sorted([str(count), str(count), "Method"])


def test_methods_of_an_unknown_kind() -> None:
    with pytest.raises(taut.TautError, match="unknown kind of method 'liner': did you mean 'linear'"):
        taut.methods("liner")
