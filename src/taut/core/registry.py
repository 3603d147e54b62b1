"""Registries of methods and tasks: ids come from listing files, and a class is imported when it is needed."""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from taut.core.declared import fields
from taut.core.errors import TautError, nearest
from taut.core.slot import KINDS

FOLDER_MODULE = "method"
"""The module of a method's folder that holds its class."""


@dataclass(frozen=True)
class Registry:
    """Finds one class per file or folder, in the folders ``kinds`` of a package and in the entry points of ``group``.

    An id is ``kind.name``, or ``name`` if there are no kinds. ``name`` is a file, or a folder with ``method.py`` and
    the modules that only this method needs. Names that begin with ``_`` are skipped. The class is the one that itself
    defines this ``id``. Other packages add classes through the entry-point group; the entry point's name is the id.

    ``settings`` is the attribute of a class that holds the pydantic model of its settings; ``setting`` is its word for
    one of them.
    """

    noun: str
    package: str
    group: str
    settings: str
    setting: str
    kinds: tuple[str, ...] = ()

    @cached_property
    def _built_in(self) -> dict[str, str]:
        root = Path(__file__).parent.parent / self.package.removeprefix("taut.").replace(".", "/")
        modules: dict[str, str] = {}
        for kind in self.kinds or ("",):
            for info in pkgutil.iter_modules([str(root / kind)]):
                if info.name.startswith("_"):
                    continue
                parts = [part for part in (kind, info.name) if part]
                module = [FOLDER_MODULE] if info.ispkg else []
                if not info.ispkg or (root / kind / info.name / f"{FOLDER_MODULE}.py").is_file():
                    modules[".".join(parts)] = ".".join([self.package, *parts, *module])
        return modules

    @cached_property
    def _outside(self) -> dict[str, EntryPoint]:
        """The entry points of other packages. They cannot replace built-in ids."""
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self._built_in}

    def built_in(self) -> tuple[str, ...]:
        """The ids that come with taut, sorted."""
        return tuple(sorted(self._built_in))

    def ids(self, kind: str | None = None) -> tuple[str, ...]:
        """All ids, or those of one kind, sorted."""
        return tuple(
            sorted(key for key in (*self._built_in, *self._outside) if kind is None or key.startswith(f"{kind}."))
        )

    def __contains__(self, key: str) -> bool:
        return key in self._built_in or key in self._outside

    def resolve(self, name: str) -> str:
        """The id that ``name`` stands for: ``name`` itself, or the one id whose last part it is. Imports no class.

        Raises TautError with the candidates if there are several, and with the nearest id if there is none.
        """
        if name in self:
            return name
        candidates = [key for key in self.ids() if key.rpartition(".")[2] == name]
        if not candidates:
            raise TautError(self.unknown(name))
        if len(candidates) > 1:
            raise TautError(f"{self.noun} {name!r} is one of several: write {' or '.join(candidates)}")
        return candidates[0]

    def check_names(self, key: str, names: Iterable[str], where: str) -> None:
        """Check the names of settings of a class without importing it. Raises TautError with the nearest name.

        The names of other packages' classes are checked only when those are imported.
        """
        if key in self._built_in:
            known = fields(self._built_in[key], key, self.settings)
            check_names(known, names, where, key, self.setting)

    def get(self, key: str) -> type[Any]:
        """Return the class with this id.

        Raises TautError with the nearest id if this one is unknown, if its entry point cannot be loaded, and if there
        is no class with this id where it should be.
        """
        if key in self._built_in:
            where = self._built_in[key]
            values = vars(importlib.import_module(where)).values()
            classes: list[type[Any]] = [value for value in values if _has_id(value, key)]
        elif key in self._outside:
            point = self._outside[key]
            where = f"entry point {point.value!r} of {self.group}"
            try:
                loaded = point.load()
            except (ImportError, AttributeError) as error:
                raise TautError(f"{self.noun} {key!r}: {where} cannot be loaded: {error}") from None
            classes = [loaded] if _has_id(loaded, key) else []
        else:
            raise TautError(self.unknown(key))
        if not classes:
            raise TautError(f"{where} defines no class with id = {key!r}; add `id = {key!r}` to its class")
        return classes[0]

    def unknown(self, key: str) -> str:
        """What an error says about an id that is not here, with the nearest one that is."""
        kind, _, name = key.rpartition(".")
        if kind and kind not in self.kinds:
            return f"unknown {self.noun} {key!r}: {nearest(key, self.ids())}"
        choices = {choice.rpartition(".")[2] for choice in self.ids(kind or None)}
        return f"unknown {f'{kind} {self.noun}'.strip()} {name!r}: {nearest(name, choices)}"


def check_names(known: Iterable[str], names: Iterable[str], where: str, owner: str, noun: str) -> None:
    """Raises TautError, which begins with ``where``, for the first of the ``names`` that ``owner`` does not know."""
    for name in names:
        if name not in known:
            raise TautError(f"{where}: {owner} has no {noun} {name!r}: {nearest(name, known)}")


def _has_id(value: object, key: str) -> bool:
    return isinstance(value, type) and vars(value).get("id") == key


METHODS = Registry("method", "taut.methods", "taut.methods", "Knobs", "knob", KINDS)
TASKS = Registry("task", "taut.evaluation.tasks", "taut.tasks", "Options", "option")


def check_task(content: dict[str, Any]) -> None:
    """Check a task given by its ``name`` and options. Raises TautError for a wrong name, of the task or an option."""
    key = TASKS.resolve(content["name"])
    TASKS.check_names(key, [name for name in content if name != "name"], f"task {key}")


def list_methods(kind: str | None = None) -> list[dict[str, Any]]:
    """The rows of ``taut.methods``."""
    if kind is not None and kind not in KINDS:
        raise TautError(f"unknown kind of method {kind!r}: {nearest(kind, KINDS)}")
    rows = []
    for key in METHODS.ids(kind):
        method = METHODS.get(key)
        knobs = {
            name: {"default": field.get_default(), "description": field.description or ""}
            for name, field in method.Knobs.model_fields.items()
        }
        row = {"id": key, "summary": method.summary, "source": method.source, "dial": method.dial, "knobs": knobs}
        rows.append(row)
    return rows
