"""Reads the arguments that several functions share, in every form that they take."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from taut.core.errors import TautError
from taut.core.recipe import Recipe

RecipeLike = str | Path | dict[str, Any] | Recipe
DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_models(*models: Any) -> None:
    """Check the names among ``models`` before anything heavy is imported; a model in memory passes.

    Raises TautError for a folder that is missing or incomplete. Hub ids and scratch specs are checked when opened.
    """
    from taut.surgery.folders import local_folder

    for model in models:
        if isinstance(model, str | Path):
            local_folder(model)


def check_out(out: str | Path | None) -> None:
    """Check that a folder can be made at ``out``, if it is given. Raises TautError if not."""
    from taut.surgery.folders import check_writable

    if out is not None:
        check_writable(Path(out).absolute())


def model_names() -> list[str]:
    """The models that have a name on this machine."""
    from taut.surgery.folders import named_models

    return named_models()


def data_names() -> tuple[str, ...]:
    """The data that can be named without a path."""
    from taut.data import names

    return names()


def read_recipe(recipe: RecipeLike) -> Recipe:
    """The recipe, its methods and knobs checked by name. Raises TautError for anything unknown."""
    return Recipe.load(recipe).check_methods()


def use_threads(threads: int | None) -> None:
    """Set the number of processor threads from here on; None leaves it as it is."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def read_texts(text: str | Path | None, exclude: Sequence[str] = ()) -> Iterable[str]:
    """The texts of a name or a file, without those of the evaluation data ``exclude``; none for None."""
    from taut.data import Data, calibration_texts

    excluded = [Data(name, "all", tuple((row,) for row in calibration_texts(name))) for name in exclude]
    return () if text is None else calibration_texts(text, excluded)


def read_dtype(dtype: Any) -> Any:
    """The torch dtype with this name. Raises TautError for any other word, before torch is imported."""
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise TautError(f"dtype = {dtype!r}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    if dtype is None:
        return None
    import torch

    value = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TautError(f"dtype = {dtype!r}: expected {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")
    return value
