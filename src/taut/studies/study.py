"""A study: models x recipes x seeds, with the same tasks and the same measurements for every cell."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from taut.core.errors import TautError, nearest
from taut.core.recipe import Recipe, shipped, shipped_sets
from taut.core.registry import check_task
from taut.core.slot import SLOTS
from taut.core.spec import TrialSpec
from taut.core.strict import Strict, kind, read_yaml

DENSE: dict[str, Any] = {}
IDENTITY: dict[str, Any] = {
    slot: {"method": "identity"} for slot in ("embedding", "projection", "attention", "feedforward")
}
"""The control of every study. It leaves out the memory slot, because an encoder has none."""

DEFAULTS: dict[str, Any] = {"tasks": ("docs_retrieval", "agreement"), "measure": {"latency": {"decode": 16}}}
"""Tasks and measurements of a study made from arguments. The tasks fit every model that reads text."""

UNITS = {"": 1, "B": 1} | {f"{p}B": 10 ** (3 * n) for n, p in enumerate("KMGT", 1)}
UNITS |= {f"{p}IB": 2 ** (10 * n) for n, p in enumerate("KMGT", 1)}


class Latency(Strict):
    """How latency is measured: the variant and the dense model take turns."""

    batch: int = Field(1, ge=1, description="sequences at once")
    length: int = Field(128, ge=1, description="tokens of each sequence")
    repeats: int = Field(20, ge=1, description="interleaved samples of each; an interval needs at least 6")
    threads: int | None = Field(None, ge=1, description="torch threads; None leaves them as they are")
    decode: int = Field(0, ge=0, description="new tokens to time one by one; 0 for none (encoders)")


class Measure(Strict):
    """What is measured in addition to the sizes, which are always measured."""

    latency: Latency | None = None
    memory: bool = Field(False, description="peak memory, in a fresh process for each trial")
    energy: bool = Field(False, description="joules, if they can be read on this machine")


class Limits(Strict):
    """What one trial may use."""

    ram: int | None = Field(None, description="bytes, or text such as 8GB; None: what the machine has free")
    seconds: float | None = Field(None, gt=0)
    former = {"memory": "ram"}

    @field_validator("ram", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match is None or match[2].upper() not in UNITS:
            raise ValueError("expected an amount of memory such as 8GB or 512MiB")
        return int(float(match[1]) * UNITS[match[2].upper()])


class Choice(Strict):
    """One checked recipe of a study, with its expected outcome and its steps of healing."""

    recipe: dict[str, Any]
    expect: Literal["done", "failed"] = "done"
    heal: int = Field(0, ge=0, description="steps of healing after compressing")


class Study(Strict):
    """Models x recipes x seeds. Every study contains ``dense`` (the baseline) and ``identity`` (the error bar)."""

    name: str = Field("study", min_length=1)
    models: tuple[str, ...] = Field(min_length=1)
    recipes: dict[str, Choice]
    tasks: tuple[dict[str, Any], ...] = ()
    seeds: tuple[int, ...] = Field((0,), min_length=1)
    measure: Measure = Measure()
    limits: Limits = Limits()
    text: str = Field("builtin", min_length=1, description="text for calibration and healing; see taut.data")
    device: str = "cpu"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    source: str = Field("study", exclude=True)

    @classmethod
    def load(cls, path: str | Path) -> "Study":
        """Read a YAML file. Raises TautError that names the file, the key and the nearest valid choice."""
        path = Path(path)
        content = read_yaml(path, "study")
        return cls.parse(content, str(path), path.parent)

    @classmethod
    def parse(cls, content: Any, source: str = "study", base: Path | None = None) -> "Study":
        """Make a study from a mapping as in YAML. Recipe files are looked for in the folder ``base`` first."""
        if not isinstance(content, dict):
            raise TautError(f"{source}: a study is a mapping with models, recipes and tasks, not {kind(content)}")
        content = {"name": Path(source).stem} | content
        recipes = content.get("recipes") or {}
        if not isinstance(recipes, dict):
            raise TautError(f"{source}: recipes: expected a mapping from names to recipes, not {kind(recipes)}")
        chosen = {str(name): _choice(value, f"{source}: recipes.{name}", base) for name, value in recipes.items()}
        for name, recipe in (("identity", IDENTITY), ("dense", DENSE)):
            if name in chosen and chosen[name].recipe != recipe:
                raise TautError(f"{source}: recipes.{name}: reserved for {recipe or '{}'}; choose another name")
            if all(choice.recipe != recipe for choice in chosen.values()):
                chosen = {name: Choice(recipe=recipe)} | chosen
        tasks = content.get("tasks") or ()
        if isinstance(tasks, str | dict):
            tasks = (tasks,)
        content |= {"recipes": chosen, "tasks": tuple(_task(task, f"{source}: tasks") for task in tasks)}
        if isinstance(content.get("models"), str):
            content["models"] = (content["models"],)
        return cls.checked(content | {"source": source}, source)

    @classmethod
    def read(cls, source: str | Path, recipes: Sequence[str] = (), **options: Any) -> "Study":
        """Read a YAML file, or make a study of one model with ``recipes`` and ``options``; see ``from_arguments``.

        Raises TautError for wrong input, for a model without recipes, and for recipes or options beside a file.
        """
        if Path(source).suffix in (".yaml", ".yml"):
            if extra := [*recipes, *options]:
                raise TautError(f"{source}: a study's file says what to compare; leave out {extra[0]!r}")
            return cls.load(source)
        if not recipes:
            raise TautError(
                f"{source}: give the recipes to compare, for example --recipes light, or the YAML file of a study"
            )
        return cls.from_arguments(str(source), recipes, **DEFAULTS | options)

    @classmethod
    def from_arguments(
        cls,
        model: str | Sequence[str],
        recipes: Sequence[str],
        tasks: Sequence[str | dict[str, Any]] = (),
        **options: Any,
    ) -> "Study":
        """Make a study without YAML.

        Each of ``recipes`` is a file, a folder of files, the name of a shipped set (``light``) or of a shipped recipe.
        ``options`` are the other fields of a study (seeds, measure, limits, device, dtype, name). Raises TautError for
        wrong input.
        """
        chosen: dict[str, dict[str, Any]] = {}
        where: dict[str, Path] = {}
        for argument in recipes:
            for path in _recipe_files(argument):
                name = path.stem
                if name in where and where[name] != path:
                    raise TautError(f"recipes: {where[name]} and {path} have the same name {name!r}; rename one file")
                chosen[name], where[name] = Recipe.load(path).to_dict(), path
        models = [model] if isinstance(model, str) else list(model)
        content = {"name": "-".join(re.sub(r"\W+", "-", Path(one).name).strip("-") for one in models) or "study"}
        return cls.parse(content | {"models": models, "recipes": chosen, "tasks": list(tasks)} | options, "arguments")

    def narrowed(self, recipes: Sequence[str] = (), device: str | None = None, threads: int | None = None) -> "Study":
        """This study with only some recipes and its two controls, on another device, with another thread count.

        Raises TautError for an unknown recipe.
        """
        for name in recipes:
            if name not in self.recipes:
                raise TautError(f"{self.source}: no recipe {name!r}: {nearest(name, self.recipes)}")
        controls = [name for name, choice in self.recipes.items() if choice.recipe in (DENSE, IDENTITY)]
        kept = {name: one for name, one in self.recipes.items() if not recipes or name in (*recipes, *controls)}
        latency = self.measure.latency
        if latency is not None and threads is not None:
            latency = latency.model_copy(update={"threads": threads})
        measure = self.measure.model_copy(update={"latency": latency})
        return self.model_copy(update={"recipes": kept, "device": device or self.device, "measure": measure})

    @property
    def digest(self) -> str:
        """A hash of the ids of all trials."""
        return hashlib.sha256(json.dumps(sorted(spec.id for spec in self._specs())).encode()).hexdigest()[:16]

    def trials(self) -> tuple[TrialSpec, ...]:
        """All cells, dense and identity first. Raises TautError that names two cells if they are the same trial."""
        owner: dict[str, TrialSpec] = {}
        for spec in self._specs():
            if (other := owner.setdefault(spec.id, spec)) is not spec:
                raise TautError(f"{self.source}: {other.name!r} and {spec.name!r} are the same trial; remove one")
        digest = self.digest
        return tuple(spec.model_copy(update={"study_digest": digest}) for spec in owner.values())

    def _specs(self) -> list[TrialSpec]:
        fingerprints = {model: fingerprint(model) for model in self.models}
        return [
            TrialSpec(
                study=self.name,
                model=model,
                model_digest=fingerprints[model],
                recipe_name=name,
                recipe=choice.recipe,
                expect=choice.expect,
                seed=seed,
                tasks=self.tasks,
                measure=self.measure.model_dump(),
                text=self.text,
                heal=choice.heal,
                device=self.device,
                dtype=self.dtype,
                ram=self.limits.ram,
                seconds=self.limits.seconds,
            )
            for model in self.models
            for name, choice in self.recipes.items()
            for seed in self.seeds
        ]


def fingerprint(model: str, blocks: int = 64, size: int = 4096) -> str | None:
    """A hash of a local model folder. None if ``model`` is not a folder: names and specs identify themselves.

    It covers evenly spaced blocks of each JSON and weight file, so a model that is trained further is another model.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".json", ".safetensors") or not path.is_file():
            continue
        length = path.stat().st_size
        digest.update(f"{path.name}:{length}:".encode())
        with path.open("rb") as file:
            for block in range(blocks):
                file.seek(max(0, length - size) * block // (blocks - 1))
                digest.update(file.read(size))
    return digest.hexdigest()[:16]


def _choice(value: Any, where: str, base: Path | None) -> Choice:
    """Check a recipe as written in a study: a mapping (``expect`` and ``heal`` beside the slots), a file, a shipped
    name, or nothing. Raises TautError for anything else."""
    beside_slots: dict[str, Any] = {}
    if isinstance(value, str):
        neighbour = base / value if base else Path(value)
        try:
            recipe = Recipe.load(neighbour if neighbour.is_file() else value).check_methods()
        except TautError as error:
            raise TautError(f"{where}: {error}") from None
    elif value is None or isinstance(value, dict):
        slots = dict(value or {})
        beside_slots = {key: slots.pop(key) for key in ("expect", "heal") if key in slots}
        if unknown := [slot for slot in slots if slot not in SLOTS]:
            raise TautError(f"{where}: unknown slot {unknown[0]!r}: {nearest(unknown[0], (*SLOTS, 'expect', 'heal'))}")
        expect, heal = beside_slots.get("expect", "done"), beside_slots.get("heal", 0)
        if expect not in ("done", "failed"):
            raise TautError(f"{where}: expect = {expect!r}: {nearest(str(expect), ('done', 'failed'))}")
        if isinstance(heal, bool) or not isinstance(heal, int) or heal < 0:
            raise TautError(f"{where}: heal = {heal!r}: expected a number of steps such as 200")
        recipe = Recipe.parse(slots, where).check_methods()
    else:
        raise TautError(f"{where}: expected a recipe, the name of one or {{}} for dense, not {kind(value)}")
    return Choice(recipe=recipe.to_dict(), **beside_slots)


def _task(task: Any, where: str) -> dict[str, Any]:
    task = {"name": task} if isinstance(task, str) else task
    if not isinstance(task, dict) or not isinstance(task.get("name"), str):
        raise TautError(f"{where}: expected a name or a mapping with 'name', for example {{name: docs_retrieval}}")
    try:
        check_task(task)
    except TautError as error:
        raise TautError(f"{where}: {error}") from None
    return dict(task)


def _recipe_files(argument: str) -> list[Path]:
    """The YAML files that one word of ``--recipes`` names. Raises TautError if there are none."""
    recipes, sets = shipped(), shipped_sets()
    path = Path(argument)
    if path.is_file():
        return [path]
    if path.is_dir() and (files := sorted(path.glob("*.yaml"))):
        return files
    if argument in sets:
        return sets[argument]
    if argument in recipes:
        return [recipes[argument]]
    choices = nearest(argument, [*sets, *recipes])
    raise TautError(f"{argument}: no recipe file, folder of recipes, shipped set or shipped recipe: {choices}")
