"""Checks that a recipe fits a model before any weight is read, and passes on the skeleton and the plan."""

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
    """A model and a recipe that fits it.

    ``skeleton`` is the model on the meta device, and ``plan`` was made with it. ``dtype`` is its dtype, in which the
    weights will be read. ``tokenizer`` opens the tokenizer when first called, and returns None if the source has none.
    """

    source: Source
    dtype: torch.dtype
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

    ``dtype`` None is the checkpoint's own. ``tokenizer`` replaces the source's. ``skeleton`` is an open one, in the
    same dtype. Raises TautError as ``make_plan`` does.
    """
    open_once = cache(lambda: open_tokenizer(source) if tokenizer is None else tokenizer)
    dtype = dtype or source.dtype
    skeleton = open_skeleton(source, dtype) if skeleton is None else skeleton
    return Prepared(source, dtype, skeleton, make_plan(skeleton, recipe, tokenizer=open_once), open_once)
