"""The main findings, from rows made by hand: which recipe each card names, and its figure and text."""

import pytest
from sample_records import record

from taut.reporting.highlights import Card, highlights
from taut.studies.protocol import NOISE, UNKNOWN, Cell, Gap, Row, Source

DONE = record()
SOURCES = (Source(DONE, DONE.scores[0].quantity, DONE.scores[0]),)
WORDS = {
    "score": {"better": True, "worse": False},
    "stored_bytes": {"smaller": True, "larger": False},
    "latency_prefill": {"faster": True, "slower": False},
    "latency_decode": {"faster": True, "slower": False},
}


def score(value: float, word: str) -> Cell:
    gap = Gap("difference", value, "", value - 0.01, value + 0.01, word=word, good=WORDS["score"].get(word))
    return Cell(0.5 + value, "", "", "higher", SOURCES, gap=gap)


def size(megabytes: float, word: str = "smaller") -> Cell:
    gap = Gap("ratio", megabytes / 100, "", word=word, good=WORDS["stored_bytes"].get(word))
    return Cell(megabytes * 1e6, "bytes", "", "lower", (Source(DONE, DONE.costs["stored_bytes"]),), gap=gap)


def seconds(ratio: float, word: str) -> Cell:
    gap = Gap("ratio", ratio, "", ratio - 0.05, ratio + 0.05, word=word, good=WORDS["latency_prefill"].get(word))
    return Cell(ratio, "s", "", "lower", (Source(DONE, DONE.costs["latency_prefill"]),), gap=gap)


def row(name: str, quality: Cell | None, role: str = "variant", done: bool = True, **costs: Cell) -> Row:
    records = (DONE,) if done else ()
    return Row("m", name, {}, role, records, scores={"t m": quality} if quality else {}, costs=costs)


DENSE = row("dense", Cell(0.5, "", "", "higher", SOURCES), "dense", stored_bytes=Cell(1e8, "bytes", "", "lower", ()))


def cards(*rows: Row) -> dict[str, Card]:
    return {card.label: card for card in highlights([DENSE, *rows])}


@pytest.mark.parametrize("word", ["same", NOISE, "better"])
def test_the_smallest_and_the_fastest_have_no_visible_loss(word: str) -> None:
    """The smallest and fastest of all has lost, so the best of the others is named, whatever its order."""
    kept = row("kept", score(-0.02, word), stored_bytes=size(40), latency_prefill=seconds(0.8, "faster"))
    lost = row("lost", score(-0.3, "worse"), stored_bytes=size(10), latency_prefill=seconds(0.2, "faster"))
    unsure = row("unsure", score(-0.1, UNKNOWN), stored_bytes=size(20), latency_prefill=seconds(0.4, "faster"))
    blind = row("blind", None, stored_bytes=size(5), latency_prefill=seconds(0.1, "faster"))
    large = row("large", score(0.0, "same"), stored_bytes=size(70), latency_prefill=seconds(0.9, "faster"))
    told = cards(lost, large, kept, unsure, blind)
    change = f"t m −0.0200 {word} [−0.0300, −0.0100]"
    assert told["smallest without a visible loss"] == Card(
        "smallest without a visible loss", "2.5× smaller", "kept", f"40 MB; {change}", "m"
    )
    assert told["fastest prefill without a visible loss"] == Card(
        "fastest prefill without a visible loss",
        "1.25× faster",
        "kept",
        f"time ratio 0.80 [0.75, 0.85]; {change}",
        "m",
    )


def test_without_an_unharmed_variant_no_gain_is_told() -> None:
    lost = row("lost", score(-0.3, "worse"), stored_bytes=size(10), latency_decode=seconds(0.2, "faster"))
    assert set(cards(lost)) == {"slower than dense", "measurably worse"}
    larger = row("larger", score(0.0, "same"), stored_bytes=size(130, "larger"), latency_decode=seconds(1.0, NOISE))
    assert set(cards(larger)) == {"slower than dense", "measurably worse"}


def test_the_slower_ones_are_counted_among_the_timed_ones() -> None:
    rows = (
        row("a bit", score(0.0, "same"), latency_decode=seconds(1.3, "slower")),
        row("most", score(-0.3, "worse"), latency_decode=seconds(1.7, "slower")),
        row("quick", score(0.0, "same"), latency_decode=seconds(0.6, "faster")),
        row("noisy", score(0.0, "same"), latency_decode=seconds(1.9, NOISE)),
        row("untimed", score(0.0, "same")),
        row("alone", score(0.0, "same"), latency_decode=Cell(1.0, "s", "", "lower", ())),
    )
    told = cards(*rows)
    text = "decode; the slowest is 1.70× slower"
    assert told["slower than dense"] == Card("slower than dense", "2 of 4", "most", text, "m")
    assert told["fastest decode without a visible loss"].recipe == "quick"
    assert cards(*rows[2:])["slower than dense"] == Card("slower than dense", "0 of 2", "none", "decode", "m")
    assert "slower than dense" not in cards(*rows[4:])


def test_the_worst_is_the_one_that_lost_most() -> None:
    rows = (
        row("some", score(-0.1, "worse")),
        row("most", score(-0.4, "worse")),
        row("less", score(-0.2, "worse")),
        row("gain", score(0.5, "better")),
        row("untested", None),
    )
    text = "t m; the worst: −0.4000 [−0.4100, −0.3900]"
    assert cards(*rows)["measurably worse"] == Card("measurably worse", "3 of 5", "most", text, "m")
    assert cards(*rows[3:])["measurably worse"] == Card("measurably worse", "0 of 2", "none", "t m", "m")


def test_only_finished_variants_count() -> None:
    control = row("identity", score(-0.3, "worse"), "identity", stored_bytes=size(1))
    failed = row("failed", score(-0.3, "worse"), done=False, stored_bytes=size(1))
    assert highlights([DENSE, control, failed]) == []
    kept = row("kept", score(0.0, "same"), stored_bytes=size(40))
    told = cards(control, failed, kept)
    assert told["smallest without a visible loss"].recipe == "kept"
    assert told["measurably worse"].figure == "0 of 1"
    assert highlights([row("kept", None)]) == [], "no score, no finding"
