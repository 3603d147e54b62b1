"""The folder is the list: ids are found by listing files, classes are imported when asked for."""

import importlib
import pkgutil
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from taut.core.errors import TautError, nearest
from taut.core.slot import KINDS


@dataclass(frozen=True)
class Registry:
    """Finds one class a file, in the folders ``kinds`` of a package and in the entry points of ``group``.

    An id is ``kind.file`` (or ``file`` where there are no kinds); the class is the one whose own ``id`` says the
    same. Packages outside add theirs through the entry-point group, with the id as the entry point's name.
    """

    noun: str
    package: str
    group: str
    kinds: tuple[str, ...] = ()

    @cached_property
    def _found(self) -> dict[str, str | EntryPoint]:
        root = Path(__file__).parent.parent / self.package.removeprefix("taut.").replace(".", "/")
        found: dict[str, str | EntryPoint] = {}
        for kind in self.kinds or ("",):
            for info in pkgutil.iter_modules([str(root / kind)]):
                if not info.ispkg and not info.name.startswith("_") and info.name not in ("part", "task"):
                    parts = [part for part in (kind, info.name) if part]
                    found[".".join(parts)] = ".".join([self.package, *parts])
        for point in entry_points(group=self.group):
            found[point.name] = point
        return found

    def ids(self, kind: str | None = None) -> tuple[str, ...]:
        """All ids, or those of one kind, sorted."""
        return tuple(sorted(key for key in self._found if kind is None or key.startswith(kind + ".")))

    def get(self, key: str) -> type:
        """The class with this id. Raises TautError naming the nearest id when there is none."""
        if key not in self._found:
            kind, _, name = key.rpartition(".")
            choices = [choice.rpartition(".")[2] for choice in self.ids(kind or None)]
            label = f"{kind} {self.noun}" if kind else self.noun
            raise TautError(f"unknown {label} {name!r}: {nearest(name, choices)}")
        where = self._found[key]
        if isinstance(where, EntryPoint):
            return where.load()
        module = importlib.import_module(where)
        for value in vars(module).values():
            if isinstance(value, type) and vars(value).get("id") == key:
                return value
        raise TautError(f"{where} defines no class with id = {key!r}; add `id = {key!r}` to its class")


METHODS = Registry("method", "taut.methods", "taut.methods", KINDS)
TASKS = Registry("task", "taut.tasks", "taut.tasks")
