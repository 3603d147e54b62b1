"""A model and a recipe that fit, before any weight is read: opened once, planned once, and handed on."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.core.recipe import Recipe
from taut.surgery.loading import Source, open_skeleton, open_tokenizer
from taut.surgery.plan import Plan, make_plan


@dataclass(frozen=True)
class Prepared:
    """``skeleton`` is the model on the meta device, in the dtype that its weights will be read in. ``plan`` was made on
    it. ``tokenizer`` opens the tokenizer when it is first called; it gives None where the source has none."""

    source: Source
    skeleton: PreTrainedModel
    plan: Plan
    tokenizer: Callable[[], PreTrainedTokenizerBase | None]


def prepare(
    source: Source,
    recipe: Recipe,
    *,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    skeleton: PreTrainedModel | None = None,
) -> Prepared:
    """Check ``recipe`` on the skeleton of ``source``.

    ``dtype`` None is the checkpoint's own. ``tokenizer`` replaces the source's. ``skeleton`` is one that was opened
    already, in the same dtype. Raises TautError as ``make_plan`` does.
    """
    open_once = cache(lambda: open_tokenizer(source) if tokenizer is None else tokenizer)
    skeleton = open_skeleton(source, dtype) if skeleton is None else skeleton
    return Prepared(source, skeleton, make_plan(skeleton, recipe, tokenizer=open_once), open_once)
