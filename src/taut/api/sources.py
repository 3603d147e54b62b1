"""Reads the arguments that several functions share, in every form that they take."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from taut.core.errors import TautError
from taut.core.recipe import Recipe

RecipeLike = str | Path | dict | Recipe


def use_threads(threads: int | None) -> None:
    """Set the number of processor threads from here on; None leaves it as it is."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def read_texts(text: str | Path | None, exclude: Sequence[str] = ()) -> Iterable[str]:
    """The texts of a name or a file, without those of the evaluation data ``exclude``; none for None."""
    from taut.data import Data, calibration_texts

    excluded = [Data(name, "all", tuple((row,) for row in calibration_texts(name))) for name in exclude]
    return () if text is None else calibration_texts(text, excluded)


def read_dtype(dtype: Any) -> Any:
    """The torch dtype with this name. Raises TautError for any other word."""
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    value = getattr(torch, str(dtype), None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise TautError(f"dtype = {dtype!r}: expected float32, bfloat16, float16 or float64")
    return value
