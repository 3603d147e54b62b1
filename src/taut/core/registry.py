"""The folder is the list: ids are found by listing files, classes are imported when asked for."""

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from taut.core.errors import TautError, nearest
from taut.core.slot import KINDS

FOLDER_MODULE = "method"
"""The module of a method's folder that holds its class."""


@dataclass(frozen=True)
class Registry:
    """Finds one class a file or folder, in the folders ``kinds`` of a package and in the entry points of ``group``.

    An id is ``kind.name`` (or ``name`` where there are no kinds). ``name`` is a file, or a folder with ``method.py``
    and whatever that method alone needs; a name that begins with ``_`` is neither. The class is the one whose own
    ``id`` says the same. Packages outside add theirs through the entry-point group, with the id as the entry point's
    name.
    """

    noun: str
    package: str
    group: str
    kinds: tuple[str, ...] = ()

    @cached_property
    def _built_in(self) -> dict[str, str]:
        root = Path(__file__).parent.parent / self.package.removeprefix("taut.").replace(".", "/")
        found: dict[str, str] = {}
        for kind in self.kinds or ("",):
            for info in pkgutil.iter_modules([str(root / kind)]):
                if info.name.startswith("_"):
                    continue
                parts = [part for part in (kind, info.name) if part]
                module = [FOLDER_MODULE] if info.ispkg else []
                if not info.ispkg or (root / kind / info.name / f"{FOLDER_MODULE}.py").is_file():
                    found[".".join(parts)] = ".".join([self.package, *parts, *module])
        return found

    @cached_property
    def _outside(self) -> dict[str, EntryPoint]:
        """A package outside adds to the list; it cannot replace what is there."""
        return {point.name: point for point in entry_points(group=self.group) if point.name not in self._built_in}

    def built_in(self) -> tuple[str, ...]:
        """The ids that come with taut, sorted."""
        return tuple(sorted(self._built_in))

    def ids(self, kind: str | None = None) -> tuple[str, ...]:
        """All ids, or those of one kind, sorted."""
        return tuple(
            sorted(key for key in (*self._built_in, *self._outside) if kind is None or key.startswith(f"{kind}."))
        )

    def get(self, key: str) -> type:
        """The class with this id. Raises TautError naming the nearest id when there is none, and when a package
        outside is broken or gives a class with another id."""
        if key in self._built_in:
            where = self._built_in[key]
            found = [value for value in vars(importlib.import_module(where)).values() if _has_id(value, key)]
        elif key in self._outside:
            point = self._outside[key]
            where = f"entry point {point.value!r} of {self.group}"
            try:
                loaded = point.load()
            except (ImportError, AttributeError) as error:
                raise TautError(f"{self.noun} {key!r}: {where} cannot be loaded: {error}") from None
            found = [loaded] if _has_id(loaded, key) else []
        else:
            kind, _, name = key.rpartition(".")
            choices = [choice.rpartition(".")[2] for choice in self.ids(kind or None)]
            label = f"{kind} {self.noun}" if kind else self.noun
            raise TautError(f"unknown {label} {name!r}: {nearest(name, choices)}")
        if not found:
            raise TautError(f"{where} defines no class with id = {key!r}; add `id = {key!r}` to its class")
        return found[0]


def _has_id(value: object, key: str) -> bool:
    return isinstance(value, type) and vars(value).get("id") == key


METHODS = Registry("method", "taut.methods", "taut.methods", KINDS)
TASKS = Registry("task", "taut.evaluation.tasks", "taut.tasks")
