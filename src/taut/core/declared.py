"""What a class declares, read from its source: a mistyped name is found without importing torch."""

import ast
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def fields(module: str, key: str, settings: str) -> tuple[str, ...]:
    """The fields of the pydantic model ``settings`` (``Knobs``, ``Options``) of the class in ``module`` whose id is
    ``key``, with those that it inherits, in no promised order."""
    for name, node in _read(module).classes.items():
        identity = _assigned(node, "id")
        if isinstance(identity, ast.Constant) and identity.value == key:
            return tuple(_fields(*_settings(module, name, settings)))
    return ()


@dataclass(frozen=True)
class _Source:
    """The classes of a module, and where each name that it imports comes from."""

    classes: dict[str, ast.ClassDef]
    imported: dict[str, tuple[str, str]]


@cache
def _read(module: str) -> _Source:
    spec = find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    body = ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body
    imports = [node for node in body if isinstance(node, ast.ImportFrom)]
    return _Source(
        {node.name: node for node in body if isinstance(node, ast.ClassDef)},
        {
            alias.asname or alias.name: (node.module, alias.name)
            for node in imports
            if node.module
            for alias in node.names
        },
    )


def _found(module: str, name: str) -> tuple[str, str] | None:
    """The module of taut that defines a class of this name in ``module``. None for classes of other packages."""
    while name not in _read(module).classes:
        module, name = _read(module).imported.get(name, ("", ""))
        if not module.startswith("taut."):
            return None
    return module, name


def _parents(module: str, name: str) -> list[tuple[str, str]]:
    bases = [base.id for base in _read(module).classes[name].bases if isinstance(base, ast.Name)]
    return [parent for base in bases if (parent := _found(module, base)) is not None]


def _settings(module: str, name: str, settings: str) -> tuple[str, str]:
    """Where the model is defined that a class, or the nearest of its parents, assigns to ``settings``."""
    value = _assigned(_read(module).classes[name], settings)
    if isinstance(value, ast.Name) and (defined := _found(module, value.id)) is not None:
        return defined
    return next(_settings(*parent, settings) for parent in _parents(module, name))


def _fields(module: str, name: str) -> set[str]:
    lines = [line for line in _read(module).classes[name].body if isinstance(line, ast.AnnAssign)]
    own = {ast.unparse(line.target) for line in lines if "ClassVar" not in ast.unparse(line.annotation)}
    return own.union(*(_fields(*parent) for parent in _parents(module, name)))


def _assigned(node: ast.ClassDef, name: str) -> ast.expr | None:
    """What the body of a class assigns to ``name``."""
    for line in node.body:
        if isinstance(line, ast.Assign) and name in map(ast.unparse, line.targets):
            return line.value
        if isinstance(line, ast.AnnAssign) and ast.unparse(line.target) == name:
            return line.value
    return None
