"""Numbers, verdicts and recipes as people read them, from a table made by hand."""

import pytest
from sample_records import record, spec

from taut.studies import words
from taut.studies.protocol import NOISE, UNKNOWN, Cell, Gap, Row, Source

DONE = record()


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (999.4, "bytes", "999 B"),
        (999.5, "bytes", "1 kB"),
        (-999.4, "bytes", "-999 B"),
        (-2500, "B", "-2.5 kB"),
        (1536, "bytes/token", "1.54 kB"),
        (2.5e9, "bytes", "2.5 GB"),
        (3e12, "bytes", "3 TB"),
        (4e15, "bytes", "4e+03 TB"),
        (1.0, "s", "1 s"),
        (0.999, "seconds", "999 ms"),
        (0.001, "s", "1 ms"),
        (0.0009, "s", "900 µs"),
        (1000, "parameters", "1 k"),
        (999, "FLOPs/token", "999"),
        (1234.5, "x", "1.23 k x"),
        (-1234.5, "x", "-1.23 k x"),
        (999.96, "J", "1000 J"),
        (1.23456, "x", "1.235 x"),
        (7.5e9, "FLOPs/token", "7.5 G"),
        (7.5e12, "", "7.5 T"),
    ],
)
def test_quantities(number: float, unit: str, text: str) -> None:
    assert words.quantity(number, unit) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.123456, "0.1235"), (9.99994, "9.9999"), (10.0, "10"), (-10.0, "-10"), (123.4567, "123.46"), (-9.5, "-9.5000")],
)
def test_scores(number: float, text: str) -> None:
    assert words.score(number) == text


@pytest.mark.parametrize(
    ("number", "text"), [(0.25, "+0.2500"), (-0.25, "−0.2500"), (0.0, "±0.0000"), (12.5, "+12.5"), (-12.5, "−12.5")]
)
def test_differences_have_a_sign(number: float, text: str) -> None:
    assert words.signed(number) == text


def test_a_cell_is_a_score_a_quantity_or_missing() -> None:
    quantity, score = DONE.scores[0].quantity, DONE.scores[0]
    assert words.value(Cell(0.5, "bytes", "", "higher", (Source(DONE, quantity, score),))) == "0.5000"
    assert words.value(Cell(5000, "bytes", "", "lower", (Source(DONE, quantity),))) == "5 kB"
    assert words.value(Cell(0.0, "bytes", "", "lower", (Source(DONE, quantity),))) == "0 B"
    assert words.value(Cell(None, "bytes", "", "lower", (Source(DONE, quantity),))) == "n/a"


SIZE, TIME = ("smaller", "larger"), ("faster", "slower")


@pytest.mark.parametrize(
    ("kind", "value", "word", "names", "text"),
    [
        ("difference", -0.0012, NOISE, None, "−0.0012 within noise"),
        ("difference", 0.5, "", None, "+0.5000"),
        ("difference", 0.5, "better", SIZE, "+0.5000 better"),
        ("ratio", 0.8, "faster", TIME, "1.25× faster"),
        ("ratio", 0.8, "slower", TIME, "0.80× slower"),
        ("ratio", 1.0, "same", None, "same"),
        ("ratio", 0.9, UNKNOWN, TIME, "0.90× no interval"),
        ("ratio", 0.9, UNKNOWN, SIZE, "0.90× no interval"),
        ("ratio", 0.9, "smaller", None, "0.90× smaller"),
        ("ratio", 0.5, "smaller", SIZE, "2× smaller"),
        ("ratio", 0.51, "smaller", SIZE, "49% smaller"),
        ("ratio", 0.3, "smaller", SIZE, "3.33× smaller"),
        ("ratio", 2.0, "larger", SIZE, "2× larger"),
        ("ratio", 1.99, "larger", SIZE, "99% larger"),
        ("ratio", 2.5, "more", ("fewer", "more"), "2.5× more"),
        ("ratio", 0.0, "smaller", SIZE, "0× smaller"),
    ],
)
def test_gaps(kind: str, value: float, word: str, names: tuple[str, str] | None, text: str) -> None:
    assert words.gap(Gap(kind, value, "", word=word), names) == text
    assert words.gap(None, names) == ""


def test_intervals() -> None:
    assert words.interval(None) == ""
    assert words.interval(Gap("ratio", 1.0, "", low=0.5)) == ""
    assert words.interval(Gap("ratio", 1.0, "", high=0.5)) == ""
    assert words.interval(Gap("ratio", 1.0, "", 0.954, 1.056)) == "[0.95, 1.06]"
    assert words.interval(Gap("difference", 0.0, "", -0.01, 0.02)) == "[−0.0100, +0.0200]"
    assert words.interval(Gap("difference", 0.0, "", 0.0, 0.0)) == "[±0.0000, ±0.0000]"
    assert words.interval(Cell(0.02, "s", "", "lower", (), 0.01, 0.03)) == "[10 ms, 30 ms]"


@pytest.mark.parametrize(
    ("word", "good", "expected"),
    [
        ("faster", True, "good"),
        ("slower", False, "bad"),
        (NOISE, True, "noise"),
        ("same", None, "noise"),
        ("same", False, "noise"),
        ("larger", None, "noise"),
        (UNKNOWN, None, "unknown"),
        (UNKNOWN, True, "unknown"),
        ("", None, "none"),
        ("", True, "none"),
    ],
)
def test_verdicts_set_the_colour(word: str, good: bool | None, expected: str) -> None:
    assert words.verdict(Gap("ratio", 1.0, "", word=word, good=good)) == expected
    assert words.verdict(None) == "none"


def test_labels_of_costs() -> None:
    assert words.label("latency_prefill") == "prefill"
    assert words.label("peak_bytes") == "peak memory"
    assert words.label("my_own_cost") == "my own cost"


LOW, HIGH, NOTHING = {"method": "low_bit"}, {"method": "low_rank"}, {"method": "identity"}


@pytest.mark.parametrize(
    ("recipe", "slots", "family"),
    [
        ({"embedding": LOW}, ["embedding"], "embedding"),
        ({"memory": LOW, "embedding": NOTHING}, ["memory"], "memory"),
        ({"projection": LOW}, ["projection"], "linear maps"),
        ({"feedforward": [NOTHING, LOW]}, ["feedforward"], "linear maps"),
        ({"feedforward": LOW, "projection": LOW}, ["projection", "feedforward"], "linear maps"),
        ({"attention": LOW}, ["attention"], "attention"),
        ({"attention": LOW, "embedding": LOW}, ["embedding", "attention"], "combination"),
        ({"feedforward": LOW, "embedding": LOW}, ["embedding", "feedforward"], "combination"),
    ],
)
def test_the_family_of_a_recipe(recipe: dict, slots: list[str], family: str) -> None:
    row = Row("m", "r", recipe, "variant", (record(spec("r", recipe)),))
    assert words.slots_of(row) == slots
    assert words.family(row) == family


@pytest.mark.parametrize("role", ["dense", "identity"])
def test_the_family_of_a_control_is_its_role(role: str) -> None:
    row = Row("m", "r", {} if role == "dense" else {"embedding": NOTHING}, role, (DONE,))
    assert (words.slots_of(row), words.family(row)) == ([], role)


def test_the_methods_of_a_slot_are_named_once() -> None:
    row = Row("m", "r", {"feedforward": [LOW, HIGH, LOW], "embedding": HIGH}, "variant", (DONE,))
    assert words.method(row, "feedforward") == "low_bit + low_rank"
    assert words.method(row, "embedding") == "low_rank"


def test_recipes_on_one_line() -> None:
    assert words.recipe_line({}) == "nothing changed"
    recipe = {"embedding": {"method": "low_bit", "bits": 8}, "memory": {"method": "window_sink"}, "new": LOW}
    assert words.recipe_line(recipe) == "embedding: low_bit bits 8 · memory: window_sink · new: low_bit"
    recipe = {"projection": HIGH | {"store": LOW}, "attention": LOW, "feedforward": [LOW, HIGH | {"layers": "0"}]}
    assert words.recipe_line(recipe) == (
        "projection: low_rank stored as low_bit · attention: low_bit · "
        "feed-forward: low_bit · feed-forward: low_rank layers 0"
    )
