"""LoRA beside the maps that a recipe left dense: few numbers to train, merged into the maps at the end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from taut.core.errors import TautError

NAME = "healing"


@contextmanager
def adapted(model: PreTrainedModel, paths: Sequence[str], rank: int, seed: int) -> Iterator[dict[nn.Parameter, float]]:
    """LoRA (Hu et al. 2021, arXiv 2106.09685) of ``rank`` at ``paths``, by PEFT: W x + B A x, with B zero at the start.

    Gives the new tensors with the root mean square that each counts as having: B's is that of its A. At the end B A is
    added to the maps and the model has its own modules again; after a failure the maps are as they were. Raises
    TautError when there is no map or PEFT is not installed.
    """
    if not paths:
        raise TautError("heal: train = adapters, but the recipe left no map dense; use parts, norms or all")
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise TautError("heal: train = adapters needs the package peft: pip install 'taut[adapters]'") from None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Alpha equal to the rank: the product counts as it is.
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(paths))
        lora = LoraModel(model, config, NAME)
    sizes = {}
    for path in paths:
        layer = model.get_submodule(path)
        inner, outer = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        sizes |= dict.fromkeys((inner, outer), float(inner.detach().square().mean().sqrt()))
    try:
        yield sizes
    except BaseException:
        lora.unload()
        raise
    lora.merge_and_unload()
