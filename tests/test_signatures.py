"""Options that the public functions name are those of the functions that they call, with the same defaults."""

import inspect
from typing import Any, get_args, get_type_hints

import pytest

import taut
from taut.api.vectors import Code
from taut.evaluation.effective_context import context
from taut.healing.settings import Healing, HealingChoices, HealingOptions
from taut.retrieval.codes import CODES
from taut.retrieval.index import Index
from taut.studies.study import Latency, Study


def _defaults(function: Any, names: set[str]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    return {name: parameters[name].default for name in names}


def test_context() -> None:
    names = set(inspect.signature(context).parameters) - {"models"}
    assert set(inspect.signature(taut.context).parameters) - {"models"} == names
    assert _defaults(taut.context, names) == _defaults(context, names)


def test_index() -> None:
    names = {"code", "width", "rotate", "bytes", "finer"}
    assert _defaults(taut.index, names) == _defaults(Index.build, names)
    assert set(get_args(Code)) == set(CODES)


def test_measure() -> None:
    assert _defaults(taut.measure, set(Latency.model_fields)) == Latency().model_dump()


def test_compare() -> None:
    own = {"models", "recipes", "source"}
    assert set(Study.model_fields) - own <= set(inspect.signature(taut.compare).parameters)
    dtype = inspect.signature(taut.compare).parameters["dtype"].annotation
    assert dtype == Study.model_fields["dtype"].annotation | None
    with pytest.raises(taut.TautError, match="dtype = 'int8'"):
        taut.compare("minilm", ["light"], dtype="int8")


def test_heal() -> None:
    fields = {name: field.annotation for name, field in Healing.model_fields.items()}
    assert get_type_hints(HealingOptions) == fields
    assert get_type_hints(HealingChoices) == {
        name: annotation for name, annotation in fields.items() if name not in ("steps", "seed")
    }
