"""``taut.Recipe``: the same recipe as YAML and mappings make, with one keyword for each slot."""

from typing import Any

import pytest

import taut
from taut.core.recipe import Entry, Recipe, shipped

LINES = [
    "low_bit",
    {"method": "low_bit"},
    Entry("embedding", "low_bit"),
    ["low_bit"],
    ({"method": "low_bit"},),
]


@pytest.mark.parametrize("line", LINES, ids=str)
def test_every_form_of_an_entry_is_the_same(line: Any) -> None:
    assert taut.Recipe(embedding=line).entries == (Entry("embedding", "low_bit"),)
    assert taut.Recipe(embedding=line) == Recipe.parse({"embedding": {"method": "low_bit"}})


def test_slots_take_several_entries_and_keep_what_they_say() -> None:
    lines = [{"method": "low_rank", "rank": 4, "layers": 0}, {"method": "low_bit", "layers": "1:", "bits": 4}]
    recipe = taut.Recipe(memory="low_bit", feedforward=lines)
    assert recipe.to_dict() == {
        "feedforward": [
            {"method": "low_rank", "layers": "0", "rank": 4},
            {"method": "low_bit", "layers": "1:", "bits": 4},
        ],
        "memory": {"method": "low_bit"},
    }


@pytest.mark.parametrize("name", shipped())
def test_a_recipe_is_made_again_from_its_dict(name: str) -> None:
    recipe = Recipe.load(name)
    assert taut.Recipe(**recipe.to_dict()) == recipe
    assert recipe.digest == taut.Recipe(**recipe.to_dict()).digest


def test_recipes_that_differ_are_not_equal() -> None:
    assert taut.Recipe(embedding="low_bit") != taut.Recipe(memory="low_bit")
    assert taut.Recipe(embedding={"method": "low_bit", "bits": 4}) != taut.Recipe(embedding="low_bit")
    assert taut.Recipe() == Recipe.parse({})


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"embedding": {"bits": 4}}, "recipe: embedding: expected a mapping with the key 'method'"),
        ({"embedding": 4}, "recipe: embedding: expected a mapping"),
        ({"embedding": [["low_bit"]]}, "recipe: embedding: expected a mapping"),
        ({"memory": {"method": "low_bit", "keep": 2}}, "recipe: memory: keep = 2 is out of range"),
        ({"memory": {"method": "low_bit", "layers": "0"}}, "layers does not apply to the memory slot"),
    ],
)
def test_wrong_entries(slots: dict[str, Any], message: str) -> None:
    with pytest.raises(taut.TautError, match=message):
        taut.Recipe(**slots)


def test_a_mistyped_slot_is_an_error_of_python() -> None:
    with pytest.raises(TypeError, match="embeding"):
        taut.Recipe(embeding="low_bit")


def test_it_says_itself_on_one_line() -> None:
    recipe = taut.Recipe(embedding={"method": "low_bit", "bits": 4}, memory="low_bit")
    assert repr(recipe) == "Recipe({embedding: {method: low_bit, bits: 4}, memory: {method: low_bit}})"


def test_a_plan_takes_it() -> None:
    plan = taut.plan("llama:hidden_size=32,num_hidden_layers=1,vocab_size=99", taut.Recipe(embedding="low_bit"))
    assert [step.method.id for step in plan.steps] == ["embedding.low_bit"]
