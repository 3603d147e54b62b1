"""What the verbs are given, in every form that users give it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from taut.core.errors import TautError
from taut.core.recipe import Recipe

RecipeLike = str | Path | dict | Recipe


def use_threads(threads: int | None) -> None:
    """Processor threads for everything from here on; None leaves them as they are."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)


def read_texts(text: str | Path | None, exclude: Sequence[str] = ()) -> Iterable[str]:
    """The texts of a name, a file or nothing, without those of the evaluation data ``exclude``."""
    from taut.data import Data, calibration_texts

    taken = [Data(name, "all", tuple((row,) for row in calibration_texts(name))) for name in exclude]
    return () if text is None else calibration_texts(text, taken)


def read_dtype(dtype: Any) -> Any:
    """A torch dtype from its name. Raises TautError for another word."""
    import torch

    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise TautError(f"dtype = {dtype!r}: expected float32, bfloat16, float16 or float64")
    return found
