"""A recipe: which method fills which slot, in which layers, and how strongly. Users write nothing else."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from taut.core.errors import TautError, nearest
from taut.core.registry import METHODS
from taut.core.slot import KIND_OF_SLOT, SLOTS

RESERVED = ("method", "keep", "layers", "store")


@dataclass(frozen=True)
class Entry:
    """One entry of a recipe: a method in a slot, for some layers, with its knobs and optionally a nested ``store``."""

    slot: str
    method: str
    keep: float | None = None
    layers: str | None = None
    store: "Entry | None" = None
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def method_id(self) -> str:
        return f"{KIND_OF_SLOT[self.slot]}.{self.method}"

    def covers(self, layer: int | None, count: int) -> bool:
        """Whether ``layers`` (``0``, ``1:``, ``:-1``, ``0,3,5``, ``::2``) selects layer ``layer`` of ``count``."""
        return layer is None or self.layers is None or layer in _selected(self.layers, count)

    def to_dict(self) -> dict[str, Any]:
        chosen = {"method": self.method, "keep": self.keep, "layers": self.layers, **self.knobs}
        chosen["store"] = self.store.to_dict() if self.store else None
        return {key: value for key, value in chosen.items() if value is not None}


Line = str | Mapping[str, Any] | Entry
"""One entry as users write it: the name of a method, a mapping with the key ``method``, or an entry."""


@dataclass(frozen=True, init=False, repr=False)
class Recipe:
    """A checked recipe. Methods check their knobs later, when the plan is made.

    Each slot takes one entry or several. ``source`` names the recipe in error messages. Raises TautError for a wrong
    entry.

    Examples
    --------
    >>> import taut
    >>> taut.Recipe(embedding={"method": "low_bit", "bits": 4}, memory="low_bit")
    Recipe({embedding: {method: low_bit, bits: 4}, memory: {method: low_bit}})
    """

    entries: tuple[Entry, ...]
    source: str = field(compare=False)

    def __init__(
        self,
        *,
        embedding: Line | Sequence[Line] = (),
        projection: Line | Sequence[Line] = (),
        attention: Line | Sequence[Line] = (),
        feedforward: Line | Sequence[Line] = (),
        memory: Line | Sequence[Line] = (),
        source: str = "recipe",
    ) -> None:
        slots = (embedding, projection, attention, feedforward, memory)
        entries = tuple(
            _entry(slot, line, f"{source}: {slot}")
            for slot, lines in zip(SLOTS, slots, strict=True)
            for line in (lines if isinstance(lines, list | tuple) else [lines])
        )
        # The class is frozen, so its own fields are set the long way.
        object.__setattr__(self, "entries", entries)
        object.__setattr__(self, "source", source)

    def __repr__(self) -> str:
        text = yaml.safe_dump(self.to_dict(), default_flow_style=True, sort_keys=False, width=math.inf).strip()
        return f"Recipe({text})"

    @classmethod
    def load(cls, source: "str | Path | dict[str, Any] | Recipe") -> "Recipe":
        """Load a YAML file, a recipe shipped with taut (by name), a mapping, or a recipe.

        Raises TautError that names the file, the key and the nearest valid choice.
        """
        if isinstance(source, Recipe):
            return source
        if isinstance(source, dict):
            return cls.parse(source)
        path = find(source)
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise TautError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
        return cls.parse({} if content is None else content, str(path))

    @classmethod
    def parse(cls, content: Any, source: str = "recipe") -> "Recipe":
        if not isinstance(content, dict):
            raise TautError(f"{source}: a recipe is a mapping from slots to methods, not {type(content).__name__}")
        for slot in content:
            if slot not in SLOTS:
                raise TautError(f"{source}: unknown slot {slot!r}: {nearest(slot, SLOTS)}")
        return cls(**content, source=source)

    def to_dict(self) -> dict[str, Any]:
        slots: dict[str, Any] = {}
        for entry in self.entries:
            slots.setdefault(entry.slot, []).append(entry.to_dict())
        return {slot: lines[0] if len(lines) == 1 else lines for slot, lines in slots.items()}

    @property
    def digest(self) -> str:
        """A hash of the content that does not depend on the order of the keys."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def check_methods(self) -> "Recipe":
        """Check that every method exists and has the knobs named, and return the recipe. Imports no method.

        Raises TautError that names the slot and the nearest valid choice. Values are checked when the plan is made.
        """
        for entry in self.entries:
            where = f"{self.source}: {entry.slot}"
            for each, place in ((entry, where), (entry.store, f"{where}.store")):
                if each is not None and each.method_id not in METHODS:
                    raise TautError(f"{place}: {METHODS.unknown(each.method_id)}")
            METHODS.check_names(entry.method_id, entry.knobs, where)
        return self

    def for_slot(self, slot: str) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.slot == slot)

    def check_overlap(self, slot: str, count: int) -> None:
        """Raises TautError if two entries of a slot cover the same one of ``count`` layers."""
        owner: dict[int, Entry] = {}
        for entry in self.for_slot(slot):
            for layer in range(count):
                if entry.covers(layer, count):
                    if layer in owner:
                        raise TautError(
                            f"{self.source}: {slot}: layer {layer} is claimed by {owner[layer].method!r} "
                            f"(layers {owner[layer].layers or 'all'}) and {entry.method!r} "
                            f"(layers {entry.layers or 'all'}); make their layers disjoint"
                        )
                    owner[layer] = entry


def shipped() -> dict[str, Path]:
    """The recipes that come with taut, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))}


def shipped_sets() -> dict[str, list[Path]]:
    """The sets of recipes that come with taut, by name; the name of a set is its folder."""
    sets: dict[str, list[Path]] = {}
    for path in shipped().values():
        if path.parent.name != "recipes":
            sets.setdefault(path.parent.name, []).append(path)
    return sets


def find(source: str | Path) -> Path:
    """The file of a recipe, given its path or the name of a shipped one. Raises TautError with the nearest name."""
    path = Path(source)
    if path.is_file():
        return path
    recipes = shipped()
    if str(source) in recipes:
        return recipes[str(source)]
    raise TautError(f"{source}: no such recipe file or shipped recipe: {nearest(str(source), recipes)}")


def _entry(slot: str, line: Any, where: str, nested: bool = False) -> Entry:
    if isinstance(line, Entry):
        line = line.to_dict()
    if isinstance(line, str):
        line = {"method": line}
    if not isinstance(line, Mapping) or "method" not in line:
        raise TautError(f"{where}: expected a mapping with the key 'method', for example {{method: low_bit}}")
    keep, layers, store = line.get("keep"), line.get("layers"), line.get("store")
    if not isinstance(line["method"], str):
        raise TautError(f"{where}: method must be a name, not {line['method']!r}")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1):
        raise TautError(f"{where}: keep = {keep!r} is out of range: a share above 0 and at most 1")
    if layers is not None:
        layers = str(layers)
        if nested or slot in ("embedding", "memory"):
            raise TautError(f"{where}: layers does not apply {'inside store' if nested else f'to the {slot} slot'}")
        _selected(layers, 1, where)
    if store is not None:
        if nested:
            raise TautError(f"{where}: a store cannot have a store of its own")
        store = _entry(slot, store, f"{where}.store", nested=True)
    knobs = {str(key): value for key, value in line.items() if key not in RESERVED}
    return Entry(slot, line["method"], keep, layers, store, knobs)


def _selected(layers: str, count: int, where: str = "layers") -> set[int]:
    chosen: set[int] = set()
    for piece in layers.split(","):
        try:
            if ":" in piece:
                numbers = [int(number) if number.strip() else None for number in piece.split(":")]
                chosen |= set(range(count)[slice(*numbers)])
            else:
                number = int(piece)
                chosen.add(range(count)[number] if -count <= number < count else -1)
        except (ValueError, TypeError):
            raise TautError(
                f"{where}: layers = {layers!r} is not a selection such as '0', '1:', ':-1' or '0,3'"
            ) from None
    return chosen
