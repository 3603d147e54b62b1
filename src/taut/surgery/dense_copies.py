"""Dense copies beside structured maps, where ``taut.calibrate`` found them faster."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from taut.core.environment import processor
from taut.methods.part import LinearPart
from taut.surgery.plan import Step


def install_dense_copies(model: PreTrainedModel, steps: Iterable[Step], chosen: Mapping[str, Any]) -> None:
    """Give every map the numbers of tokens at which its copy answers, and the copy. What was measured on another
    processor or device is not used, with one warning: which form is faster is another question there."""
    here = {"processor": processor(), "device": model.device.type}
    if chosen["sites"] and any(chosen[key] != value for key, value in here.items()):
        warnings.warn(
            f"taut: tuned on {chosen['processor']} ({chosen['device']}), and this is {here['processor']} "
            f"({here['device']}): structured maps are used throughout; taut tune measures this machine",
            stacklevel=2,
        )
        chosen = {"sites": {}}
    for step in steps:
        module = model.get_submodule(step.site.path)
        if isinstance(module, LinearPart) and module.may_keep_dense_copy:
            ranges = chosen["sites"].get(step.site.name, {})
            module.keep_dense_copy({int(threads): tuple(map(tuple, pairs)) for threads, pairs in ranges.items()})
