"""Completes values in a shell: names of methods, tasks, recipes, data and models. Imports no torch."""

from collections.abc import Callable, Iterable

from taut.api.sources import DTYPES, data_names, model_names
from taut.core.slot import KINDS

Complete = Callable[[str], list[str]]


def _beginning(names: Callable[[], Iterable[str]]) -> Complete:
    def complete(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return complete


def _methods() -> list[str]:
    """The ids, and each name that only one method has."""
    from taut.core.registry import METHODS

    names = [key.rpartition(".")[2] for key in METHODS.ids()]
    return [*METHODS.ids(), *(name for name in names if names.count(name) == 1)]


def _tasks() -> tuple[str, ...]:
    from taut.core.registry import TASKS

    return TASKS.ids()


def _recipes() -> Iterable[str]:
    from taut.core.recipe import shipped

    return shipped()


def _recipes_and_sets() -> list[str]:
    from taut.core.recipe import shipped, shipped_sets

    return [*shipped_sets(), *shipped()]


data = _beginning(data_names)
dtypes = _beginning(lambda: DTYPES)
kinds = _beginning(lambda: KINDS)
methods = _beginning(_methods)
models = _beginning(model_names)
recipes = _beginning(_recipes)
recipes_and_sets = _beginning(_recipes_and_sets)
tasks = _beginning(_tasks)
