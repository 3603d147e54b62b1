"""Imports run one way: the table of the design, held by reading the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "taut"
ALLOWED = {
    "core": set(),
    "ops": {"core"},
    "architectures": {"core"},
    "data": {"core"},
    "ledger": {"core"},
    "measurement": {"core"},
    "methods": {"core", "ops"},
    "surgery": {"core", "ops", "architectures", "methods", "_plugin"},
    "evaluation": {"core", "data", "surgery"},
    "retrieval": {"core", "data", "ops", "surgery", "evaluation"},
    "healing": {"core", "data", "architectures", "methods", "surgery"},
    "training": {"core", "healing", "data", "architectures", "methods", "surgery"},
    "generation": {"core", "ops", "architectures", "surgery"},
    "contract": {"core", "ops", "architectures", "methods", "surgery", "healing"},
    "comparison": {"core", "ledger"},
    "reporting": {"core", "ledger", "comparison"},
    "trial": {"core", "architectures", "data", "ledger", "measurement", "methods", "surgery", "healing"},
    "crossover": {"core", "measurement", "methods", "surgery"},
    "runner": {"core", "comparison", "ledger", "trial"},
    "_plugin": {"surgery"},
    "__main__": {"cli"},
    "cli": {"core", "verbs", "display", "launch"},
    "display": {"core", "reporting"},
    "launch": {"core"},
}
TORCH_FREE = ("core", "ledger", "comparison", "reporting", "cli", "display", "launch", "__main__")
METHOD_FILES = sorted(path for path in ROOT.glob("methods/*/**/*.py") if path.name != "__init__.py")
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ("__init__.py", "verbs"))


def _imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "taut":
                found |= {f"taut.{alias.name}" for alias in node.names}
            else:
                found.add(node.module or "")
    return found


def _room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    room = _room(path)
    ours = {name.split(".")[1] for name in _imports(path) if name.startswith("taut.")}
    assert ours - {room} <= ALLOWED[room], f"{room} imports {sorted(ours - {room} - ALLOWED[room])}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_torch_stays_out(path: Path) -> None:
    if _room(path) in TORCH_FREE:
        heavy = {name for name in _imports(path) if name.split(".")[0] in ("torch", "transformers")}
        assert not heavy


@pytest.mark.parametrize("path", METHOD_FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_methods_are_strangers(path: Path) -> None:
    """A method imports the contract, ``store``, what its kind shares (``_`` in front) and its own folder."""
    _, kind, name, *inside = path.relative_to(ROOT).parts
    shared = [f"taut.methods.{word}" for word in ("base", "part", "store")] + [f"taut.methods.{kind}._"]
    own = [f"taut.methods.{kind}.{name}."] if inside else []
    others = {f"{name}." for name in _imports(path) if name.startswith("taut.methods.")}
    assert {name for name in others if not name.startswith((*shared, *own))} == set()


def test_files_stay_short() -> None:
    long = {path.name: lines for path in FILES if (lines := len(path.read_text().splitlines())) > 400}
    assert not long
