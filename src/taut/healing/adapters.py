"""LoRA for the linear maps that a recipe left dense: few numbers to train, merged into the maps at the end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from taut.core.errors import TautError

NAME = "healing"


@contextmanager
def adapted(model: PreTrainedModel, paths: Sequence[str], rank: int, seed: int) -> Iterator[dict[nn.Parameter, float]]:
    """Add LoRA (Hu et al. 2021, arXiv 2106.09685) of ``rank`` at ``paths`` with PEFT: W x + B A x, where B starts at 0.

    Yields the new tensors, each with the root mean square that its step size is based on; B uses that of its A. At the
    end B A is added to the maps, and the model has its own modules again. After a failure the maps are unchanged.
    Raises TautError if ``paths`` is empty or PEFT is not installed.
    """
    if not paths:
        raise TautError("heal: train = adapters, but the recipe left no map dense; use parts, norms or all")
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise TautError("heal: train = adapters needs the package peft: pip install 'taut[adapters]'") from None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # With alpha equal to the rank, PEFT does not scale the product.
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
