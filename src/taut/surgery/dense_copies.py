"""Dense copies beside structured maps, where ``taut.tune`` measured that they are faster."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from taut.core.environment import processor
from taut.methods.part import LinearPart
from taut.surgery.plan import Step


def install_dense_copies(model: PreTrainedModel, steps: Iterable[Step], chosen: Mapping[str, Any]) -> None:
    """Give every map its dense copy and the numbers of tokens for which it is used.

    Ignores, with one warning, a choice that was measured on another processor or device: there, another form may be
    faster.
    """
    here = {"processor": processor(), "device": model.device.type}
    if chosen["sites"] and any(chosen[key] != value for key, value in here.items()):
        warnings.warn(
            f"taut: tuned on {chosen['processor']} ({chosen['device']}), but this is {here['processor']} "
            f"({here['device']}): no dense copies are used; run taut tune on this machine",
            stacklevel=2,
        )
        chosen = {"sites": {}}
    for step in steps:
        module = model.get_submodule(step.site.path)
        if isinstance(module, LinearPart) and module.may_keep_dense_copy:
            ranges = chosen["sites"].get(step.site.name, {})
            module.keep_dense_copy({int(threads): tuple(map(tuple, pairs)) for threads, pairs in ranges.items()})
