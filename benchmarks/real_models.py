"""The real models that the claims are shown on, and the recipes that are tried on each: shared, no claim of its own."""

import os
from pathlib import Path

from transformers import PreTrainedModel

from taut.contract.case import cases
from taut.contract.checks import COMPANIONS
from taut.core.errors import TautError
from taut.core.recipe import Recipe, shipped
from taut.core.registry import METHODS
from taut.surgery.loading import open_skeleton, resolve
from taut.surgery.plan import make_plan

MINILM = "minilm"
STORIES = "stories260K"
QUICK = ("all_int8", "table_int4", "memory.window_sink", "attention.identity")


def location(name: str) -> str:
    """What ``taut`` opens this model by: packaged, or a folder of TAUT_MODELS. Ends the program when there is none."""
    if name == MINILM:
        return name
    folder = Path(os.environ.get("TAUT_MODELS", ""), name)
    if "TAUT_MODELS" not in os.environ or not folder.is_dir():
        raise SystemExit(f"{name}: set TAUT_MODELS to the folder that holds it")
    return str(folder)


def recipes(model: str, quick: bool = False) -> dict[str, Recipe]:
    """By name: the recipes shipped with taut, every method by itself in all slots of its kind as the contract tries it
    first, and one recipe with a method in every slot. Those that fit nowhere are left out; of several that come to the
    same plan, the first stays."""
    wanted = {name: Recipe.load(name) for name in shipped()}
    wanted |= {method: cases(method, ("any",))[0].recipe() for method in METHODS.ids()}
    described = open_skeleton(resolve(model))
    chosen: dict[str, Recipe] = {}
    plans = []
    for name, recipe in wanted.items():
        try:
            plan = [step.to_dict() for step in make_plan(described, recipe).steps]
        except TautError as error:
            if "fits no site" not in str(error):
                raise
            continue
        if plan not in plans and (not quick or name in QUICK):
            chosen[name] = recipe
            plans.append(plan)
    return chosen if quick else {**chosen, "every slot": _everywhere(described)}


def _everywhere(described: PreTrainedModel) -> Recipe:
    content = {}
    for slot, line in COMPANIONS.items():
        try:
            make_plan(described, Recipe.parse({slot: line}))
        except TautError:
            continue
        content[slot] = line
    return Recipe.parse(content, "every slot")
