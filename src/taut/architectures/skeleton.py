"""Build a model on the meta device, without any values in memory."""

import copy
import re

import torch
import transformers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel

from taut.core.errors import TautError


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class ``config.architectures[0]`` if transformers has it, else the base model of the type.

    Raises TautError when transformers has no model of this type.
    """
    named = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(named, type) and issubclass(named, PreTrainedModel):
        return named
    if type(config) not in AutoModel._model_mapping:
        raise TautError(f"transformers {transformers.__version__} has no model of type {config.model_type!r}")
    classes = AutoModel._model_mapping[type(config)]
    return classes[0] if isinstance(classes, tuple) else classes


def skeleton(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build the model that ``config`` describes on the meta device: shapes and dtypes, no values.

    ``dtype``: the dtype of the parameters; by default that of the configuration, else float32. ``config`` itself is not
    changed. Raises TautError when transformers has no such model or cannot build it.
    """
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"):
            model = model_class(config)._from_config(config, dtype=dtype or config.dtype or torch.float32).eval()
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise TautError(f"transformers cannot build a model of type {config.model_type!r}: {reason}") from None
    # from_pretrained keeps these in float32 whatever dtype is requested (in float16, T5's last feed-forward map).
    kept = model._get_dtype_plan(model.dtype)
    for name, parameter in model.named_parameters():
        if any(re.search(pattern, name) for pattern in kept):
            parameter.data = parameter.data.float()
    return model
