"""Recipes, and the small tables of ``core``: what is read, what is refused, and costs worked by hand."""

import hashlib
from pathlib import Path

import pytest
from pydantic import Field

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.recipe import Entry, Recipe, find, shipped
from taut.core.record import Record
from taut.core.seeds import epoch_seed, step_seed
from taut.core.site import AttentionSite, LinearSite, MemorySite, TableSite
from taut.core.strict import Strict, kind, parse_options, read_yaml


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        (None, [0, 1, 2, 3, 4, 5]),
        ("0", [0]),
        ("5", [5]),
        ("6", []),
        ("-1", [5]),
        ("-6", [0]),
        ("-7", []),
        ("1:", [1, 2, 3, 4, 5]),
        (":-1", [0, 1, 2, 3, 4]),
        ("::2", [0, 2, 4]),
        ("1:4", [1, 2, 3]),
        ("0,3,5", [0, 3, 5]),
        ("0, 4:", [0, 4, 5]),
        ("4:9", [4, 5]),
    ],
)
def test_layers_are_selected_as_in_python(layers: str | None, chosen: list[int]) -> None:
    entry = Entry("projection", "low_bit", layers=layers)
    assert [layer for layer in range(6) if entry.covers(layer, 6)] == chosen
    assert entry.covers(None, 6), "what has no layer is always covered"


@pytest.mark.parametrize("layers", ["one", "1.5", "1:2:3:4", "", "1:2:0"])
def test_what_is_no_selection_of_layers_is_refused(layers: str) -> None:
    with pytest.raises(TautError, match="is not a selection such as '0', '1:', ':-1' or '0,3'"):
        Recipe.parse({"projection": {"method": "low_bit", "layers": layers}})


@pytest.mark.parametrize("keep", [1, 1.0, 0.001])
def test_keep_is_a_share(keep: float) -> None:
    assert Recipe.parse({"embedding": {"method": "low_rank", "keep": keep}}).entries[0].keep == keep


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.001, True, "half"])
def test_keep_outside_its_range_is_refused(keep: object) -> None:
    with pytest.raises(TautError, match=r"keep = .* is out of range: a share above 0 and at most 1"):
        Recipe.parse({"embedding": {"method": "low_rank", "keep": keep}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (["low_bit"], "recipe: a recipe is a mapping from slots to methods, not list"),
        ({"embeding": "low_bit"}, "unknown slot 'embeding': did you mean 'embedding'"),
        ({"embedding": {"keep": 0.5}}, "recipe: embedding: expected a mapping with the key 'method'"),
        ({"embedding": 3}, "expected a mapping with the key 'method'"),
        ({"embedding": {"method": 3}}, "method must be a name, not 3"),
        ({"embedding": {"method": "low_bit", "layers": 0}}, "layers does not apply to the embedding slot"),
        ({"memory": {"method": "window_sink", "layers": "0"}}, "layers does not apply to the memory slot"),
        (
            {"projection": {"method": "low_rank", "store": {"method": "low_bit", "layers": "0"}}},
            "projection.store: layers does not apply inside store",
        ),
        (
            {"projection": {"method": "low_rank", "store": {"method": "low_bit", "store": "low_bit"}}},
            "projection.store: a store cannot have a store of its own",
        ),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(content: object, message: str) -> None:
    with pytest.raises(TautError, match=message) as caught:
        Recipe.parse(content)
    assert "\n" not in str(caught.value)


def test_a_recipe_is_read_whole() -> None:
    content = {
        "projection": [{"method": "low_bit", "bits": 8, "layers": 0}, {"method": "identity", "layers": "1:"}],
        "embedding": {"method": "low_rank", "keep": 0.5, "store": "low_bit"},
    }
    recipe = Recipe.parse(content, "mine")
    assert recipe.source == "mine"
    assert recipe.entries == (
        Entry("embedding", "low_rank", 0.5, store=Entry("embedding", "low_bit")),
        Entry("projection", "low_bit", layers="0", knobs={"bits": 8}),
        Entry("projection", "identity", layers="1:"),
    )
    assert [entry.method_id for entry in recipe.entries] == ["embedding.low_rank", "linear.low_bit", "linear.identity"]
    assert recipe.for_slot("projection") == recipe.entries[1:]
    assert recipe.to_dict() == {
        "projection": [{"method": "low_bit", "bits": 8, "layers": "0"}, {"method": "identity", "layers": "1:"}],
        "embedding": {"method": "low_rank", "keep": 0.5, "store": {"method": "low_bit"}},
    }
    assert Recipe.load(recipe) is recipe
    assert Recipe.load(recipe.to_dict()).entries == recipe.entries


def test_a_digest_is_the_hash_of_the_sorted_content() -> None:
    text = b'{"embedding": {"bits": 8, "method": "low_bit"}, "memory": {"method": "window_sink"}}'
    for content in (
        {"embedding": {"method": "low_bit", "bits": 8}, "memory": "window_sink"},
        {"memory": {"method": "window_sink"}, "embedding": [{"bits": 8, "method": "low_bit"}]},
    ):
        assert Recipe.parse(content).digest == hashlib.sha256(text).hexdigest()[:16]


def test_two_entries_may_not_claim_one_layer() -> None:
    def recipe(first: str | None, second: str) -> Recipe:
        one = {"method": "low_bit"} | ({"layers": first} if first else {})
        return Recipe.parse({"projection": [one, {"method": "low_rank", "layers": second}], "feedforward": "low_bit"})

    recipe(":3", "3:").check_overlap("projection", 6)
    recipe(":3", "-1").check_overlap("projection", 4)
    recipe(None, "0").check_overlap("feedforward", 4)
    with pytest.raises(TautError, match=r"layer 2 is claimed by 'low_bit' \(layers :3\) and 'low_rank' \(layers -1\)"):
        recipe(":3", "-1").check_overlap("projection", 3)
    with pytest.raises(TautError, match=r"layer 0 is claimed by 'low_bit' \(layers all\) and 'low_rank' \(layers 0\)"):
        recipe(None, "0").check_overlap("projection", 1)


def test_recipes_are_found_by_file_before_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(shipped()))
    assert find(name) == shipped()[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("embedding: low_bit")
    assert find(name) == Path(name)
    assert Recipe.load(name).to_dict() == {"embedding": {"method": "low_bit"}}
    (tmp_path / "empty.yaml").write_text("")
    assert Recipe.load(tmp_path / "empty.yaml").entries == ()
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(TautError, match=r"bad\.yaml: not readable as YAML: .*") as caught:
        Recipe.load(tmp_path / "bad.yaml")
    assert "\n" not in str(caught.value)
    with pytest.raises(TautError, match="no such recipe file or shipped recipe: did you mean"):
        Recipe.load(name + "x")


# ---- strict reading ----


class Oven(Strict):
    """Settings of a test."""

    heat: int = Field(180, ge=50)
    mode: str = "fan"
    former = {"temperature": "heat"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"het": 1}, r"^here: unknown key 'het': did you mean 'heat'"),
        ({"temperature": 1}, r"^here: the key 'temperature' is now called 'heat'$"),
        ({"heat": 20}, r"^here: heat = 20: Input should be greater than or equal to 50$"),
        ({"heat": "hot"}, r"^here: heat = 'hot': Input should be a valid integer"),
    ],
)
def test_strict_settings_name_the_key_and_the_remedy(content: dict, message: str) -> None:
    with pytest.raises(TautError, match=message):
        Oven.checked(content, "here")


def test_strict_settings_are_read() -> None:
    assert Oven.checked({"heat": 50}, "here") == Oven(heat=50)
    assert parse_options(Oven, {"heat": 50}, "here", "the oven", "knob") == Oven(heat=50)
    with pytest.raises(TautError, match=r"^here: the oven has no knob 'hea': did you mean 'heat'"):
        parse_options(Oven, {"hea": 50}, "here", "the oven", "knob")
    with pytest.raises(TautError, match=r"^here: heat = 20: Input should be greater"):
        parse_options(Oven, {"heat": 20}, "here", "the oven", "knob")


@pytest.mark.parametrize(
    ("text", "key"),
    [("a: 1\na: 2", "'a'"), ("1: 1\n1: 2", "1"), ("a: {b: 1, c: 2, b: 3}", "'b'"), ("1.5: 1\n1.5: 2", "1.5")],
)
def test_equal_keys_are_refused(tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(TautError, match=f"not readable as YAML: the key {key} is there twice"):
        read_yaml(tmp_path / "a.yaml", "study")


def test_different_keys_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: {b: 1}\nc: {b: 2}\n1: x")
    assert read_yaml(tmp_path / "a.yaml", "study") == {"a": {"b": 1}, "c": {"b": 2}, 1: "x"}


def test_types_in_words() -> None:
    assert [kind(value) for value in (None, 3, "a", [])] == ["nothing", "a int", "a str", "a list"]


# ---- costs, sites, seeds, records ----


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3.0, 4.0) + Cost(10, 20, 30.0, 40.0) == Cost(11, 22, 33.0, 44.0)
    assert Cost() == Cost(0, 0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("dtype", "width"), [("float64", 8), ("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1), ("uint8", 1)]
)
def test_the_dense_cost_of_each_site(dtype: str, width: int) -> None:
    """A table of 10 x 3, maps of 5 x 3, attention of 2 heads of width 8 over 6 tokens, a cache of 4 layers."""
    place = {"path": "p", "dtype": dtype}
    table = TableSite(slot="embedding", rows=10, width=3, **place)
    assert table.dense() == Cost(30, 30 * width, 0.0)
    tied = TableSite(slot="embedding", rows=10, width=3, heads=("a", "b"), copies=("c",), **place)
    assert tied.dense() == Cost(30, 30 * width, 2 * 2 * 30)
    assert LinearSite(slot="projection", inputs=3, outputs=5, **place).dense() == Cost(15, 15 * width, 30.0)
    biased = LinearSite(slot="projection", inputs=3, outputs=5, bias=True, **place)
    assert biased.dense() == Cost(20, 20 * width, 30.0)
    shape = {"head_width": 8, "key_heads": 1, "position": "rope", "length": 6}
    attention = AttentionSite(slot="attention", heads=2, causal=True, **shape, **place)
    # 36 pairs over 6 tokens, twice 2 x 8 multiply-adds each.
    assert attention.dense() == Cost(flops_per_token=36 / 6 * 2 * (2 * 2 * 8))
    assert attention.flops(9.0) == 9 / 6 * 2 * (2 * 2 * 8)
    memory = MemorySite(slot="memory", layers=4, **shape, **place)
    assert memory.entry_bytes == 2 * 4 * 1 * 8 * width
    assert memory.dense() == Cost(cache_bytes_per_token=64.0 * width)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"slot": "projection"}, "projection"),
        ({"slot": "projection", "layer": 0, "role": "q"}, "projection.0.q"),
        ({"slot": "projection", "layer": 3, "stack": "decoder", "role": "cross_q"}, "projection.decoder.3.cross_q"),
    ],
)
def test_the_name_of_a_site(fields: dict, name: str) -> None:
    site = LinearSite(path="anywhere", inputs=1, outputs=1, **fields)
    assert (site.name, site.kind) == (name, "linear")


def test_seeds_of_steps_and_epochs_do_not_meet() -> None:
    assert (epoch_seed(0, 7), epoch_seed(2, 7)) == (7, 2_000_013)
    assert (step_seed(5, 0), step_seed(5, 3)) == (5, 5 + 3 * 65_536)


def test_former_names_of_costs_are_read() -> None:
    cost = {"value": 1.0, "unit": "s", "how": ""}
    fields = {"id": "a", "study": "s", "study_digest": "", "trial": "t", "model": "m", "recipe_name": "r", "recipe": {}}
    fields |= {
        "recipe_digest": "",
        "seed": 0,
        "status": "done",
        "costs": {"tighten_seconds": cost, "stored_bytes": cost},
    }
    read = Record.model_validate(fields)
    assert set(read.costs) == {"compress_seconds", "stored_bytes"}
    assert (read.version, read.expect, read.text, read.heal) == (1, "done", "builtin", 0)
