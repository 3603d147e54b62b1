"""Strict reading of YAML files that users write. Errors name the wrong key and the nearest valid one."""

import re
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from taut.core.errors import TautError, nearest
from taut.core.registry import check_names

Options = TypeVar("Options", bound=BaseModel)


class Strict(BaseModel):
    """Abstract: refuses an unknown key and names the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    former: ClassVar[dict[str, str]] = {}
    """The former names of keys, each with the present one, which the error names."""

    @model_validator(mode="before")
    @classmethod
    def _known(cls, content: Any) -> Any:
        for key in content if isinstance(content, dict) else ():
            if key in cls.former:
                raise ValueError(f"the key {key!r} is now called {cls.former[key]!r}")
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}: {nearest(key, cls.model_fields)}")
        return content

    @classmethod
    def checked(cls, content: dict[str, Any], source: str) -> Self:
        """Build from a mapping. Raises TautError in one line: ``source``, the key, the value, what was expected."""
        try:
            return cls(**content)
        except ValidationError as error:
            raise TautError(f"{source}: {first_problem(error)}") from None


def parse_options(model: type[Options], values: dict[str, Any], where: str, owner: str, noun: str) -> Options:
    """Check ``values`` and return them as ``model``, the knobs or options of ``owner``.

    Raises TautError in one line that begins with ``where``. For an unknown ``noun`` (knob, option) it names the nearest
    one; for a wrong value it says what was expected.
    """
    check_names(model.model_fields, values, where, owner, noun)
    try:
        return model(**values)
    except ValidationError as error:
        raise TautError(f"{where}: {first_problem(error, owner)}") from None


def first_problem(error: ValidationError, subject: str = "") -> str:
    """The first thing that is wrong, in one line: the key, its value and what was expected.

    ``subject`` stands for the key where the whole is wrong. For a mistyped choice the line names the nearest one.
    """
    problem = error.errors()[0]
    key = ".".join(str(step) for step in problem["loc"])
    words = problem["msg"]
    if problem["type"] == "literal_error" and isinstance(problem["input"], str):
        words = nearest(problem["input"], re.findall(r"'([^']*)'", problem["ctx"]["expected"]))
    elif problem["type"] in ("value_error", "assertion_error"):
        # The message as our validator wrote it, without what pydantic puts in front.
        words = str(problem["ctx"]["error"])
    # The value of a whole mapping would hide what is said about one of its keys.
    if key and problem["type"] != "missing" and not isinstance(problem["input"], dict):
        key += f" = {problem['input']!r}"
    return f"{key or subject}: {words}" if key or subject else words


def read_yaml(path: Path, what: str) -> Any:
    """Read a YAML file. ``what`` names it in error messages. Raises TautError that names the file."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        raise TautError(f"{path}: cannot read the {what}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TautError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None


def kind(value: Any) -> str:
    """The type of a value in words, for an error message."""
    return "nothing" if value is None else f"a {type(value).__name__}"


class _UniqueKeys(yaml.SafeLoader):
    """Refuses equal keys. Plain YAML silently keeps the last one, so a recipe would vanish from a study."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str | int | float) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            if isinstance(key, str | int | float):
                seen.add(key)
        return super().construct_mapping(node, deep)
