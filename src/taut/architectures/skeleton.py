"""A model without a single number in memory."""

import copy
import re

import torch
import transformers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from taut.core.errors import TautError


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class ``config.architectures[0]`` where transformers has it, else the base model of the type.

    Raises TautError when transformers knows no model for it.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    if type(config) not in AutoModel._model_mapping:
        raise TautError(f"transformers {transformers.__version__} has no model of type {config.model_type!r}")
    found = AutoModel._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model that ``config`` describes, on the meta device: shapes and dtypes, no values.

    ``dtype``: that of the parameters; by default what the configuration says, else float32. ``config`` itself is not
    changed. Raises TautError when transformers knows no model for it, or cannot build it.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = model_class(config)._from_config(config, dtype=dtype or config.dtype or torch.float32).eval()
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise TautError(f"transformers cannot build a model of type {config.model_type!r}: {reason}") from None
    # What from_pretrained leaves in float32 whatever it is asked for (T5's last feed-forward map in float16).
    kept = model._get_dtype_plan(model.dtype)
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in kept):
            parameter.data = parameter.data.float()
    return model
