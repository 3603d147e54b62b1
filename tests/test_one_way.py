"""Imports run one way: the table of the design, held by reading the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "taut"
# From the lowest up. A package may import those before it that its row names.
ALLOWED: dict[str, set[str]] = {
    "_plugin": set(),
    "core": set(),
    "architectures": {"core"},
    "ops": {"core"},
    "data": {"core"},
    "measurement": {"core"},
    "methods": {"core", "ops"},
    "surgery": {"_plugin", "core", "architectures", "ops", "measurement", "methods"},
    "healing": {"core", "architectures", "data", "methods", "surgery"},
    "training": {"core", "architectures", "data", "methods", "surgery", "healing"},
    "generation": {"core", "architectures", "ops", "surgery"},
    "evaluation": {"core", "architectures", "data", "surgery"},
    "retrieval": {"core", "ops", "data", "surgery", "evaluation"},
    "contract": {"core", "methods", "surgery", "healing"},
    "studies": {"core", "data", "measurement", "methods", "surgery", "healing", "evaluation"},
    "reporting": {"core", "studies"},
    "api": {
        *("core", "data", "surgery", "healing", "training", "generation", "evaluation", "retrieval", "contract"),
        *("measurement", "studies", "reporting"),
    },
    "cli": {"core", "reporting", "api"},
    "__main__": {"cli"},
}
TORCH_FREE = ("core", "studies", "reporting", "cli", "__main__")
WITH_TORCH = ("studies/trial.py", "studies/costs.py")


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            # The functions of the package itself are those of the api.
            names |= {"taut.api" if alias.name == "taut" else alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "taut":
                names |= {f"taut.{alias.name}" for alias in node.names}
            else:
                names.add(node.module or "")
    return names


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
OTHERS = {
    path: {name.split(".")[1] for name in _imports(path) if name.startswith("taut.")} - {_room(path)} for path in FILES
}
METHOD_FILES = sorted(path for path in ROOT.glob("methods/*/**/*.py") if path.name != "__init__.py")


def test_every_room_has_a_row() -> None:
    assert {_room(path) for path in FILES} == set(ALLOWED)


def test_the_table_in_the_docs_is_this_one() -> None:
    lines = (ROOT.parent.parent / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("\n\n```")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines.splitlines() if line.startswith("| `")]
    table = {name.strip("`").removesuffix(".py"): allowed for name, _, allowed in cells}
    assert list(table) == [room for room in ALLOWED if room != "__main__"]
    for room in set(table) - {"api"}:
        assert set(table[room].split(", ")) - {"nothing of ours"} == ALLOWED[room], room


@pytest.mark.parametrize("room", [room for room in ALLOWED if ALLOWED[room]])
def test_the_table_runs_one_way_and_is_used(room: str) -> None:
    order = list(ALLOWED)
    assert {other for other in ALLOWED[room] if order.index(other) >= order.index(room)} == set()
    used = set().union(*(OTHERS[path] for path in FILES if _room(path) == room))
    assert ALLOWED[room] == used


@pytest.mark.parametrize("path", [path for path in FILES if OTHERS[path]], ids=_name)
def test_imports_run_one_way(path: Path) -> None:
    beyond = OTHERS[path] - ALLOWED[_room(path)]
    assert not beyond, f"{_name(path)} imports {sorted(beyond)}"


def _at_import(path: Path) -> set[str]:
    """What the file imports before any function of it is called."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


LIGHT = [
    path for path in FILES if _room(path) in TORCH_FREE and _name(path) not in WITH_TORCH and path.name != "__init__.py"
]


@pytest.mark.parametrize("path", LIGHT, ids=_name)
def test_torch_stays_out(path: Path) -> None:
    heavy = {name for name in _imports(path) if name.split(".")[0] in ("torch", "transformers")}
    rooms = {name.split(".")[1] for name in _at_import(path) if name.startswith("taut.")}
    assert not heavy
    assert rooms <= {*TORCH_FREE, "api"}


@pytest.mark.parametrize("path", METHOD_FILES, ids=_name)
def test_methods_are_strangers(path: Path) -> None:
    """A method imports the contract, ``store``, what its kind shares (``_`` in front) and its own folder."""
    _, kind, name, *inside = path.relative_to(ROOT).parts
    shared = [f"taut.methods.{word}" for word in ("base", "part", "store")] + [f"taut.methods.{kind}._"]
    own = [f"taut.methods.{kind}.{name}."] if inside else []
    others = {f"{name}." for name in _imports(path) if name.startswith("taut.methods.")}
    assert {name for name in others if not name.startswith((*shared, *own))} == set()
