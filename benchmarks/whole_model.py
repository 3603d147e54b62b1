"""All of minilm in few bits: the weights' file, and what is lost on the development set of STS-B. Needs TAUT_DATA."""

import tempfile
from pathlib import Path
from typing import Any

from harness import options, record

import taut
from taut.core.recipe import Recipe
from taut.core.record import Quantity
from taut.data import calibration_texts, scored_pairs
from taut.measurement.count import folder_bytes
from taut.studies.statistics import paired_bootstrap
from taut.surgery.apply import compress, save
from taut.surgery.loading import open_tokenizer, resolve
from taut.surgery.prepare import prepare

SMALLER, LOSS = 4.5, 0.004
CLAIM = (
    f"minilm, int8 maps and a 4-bit table: the file >= {SMALLER}x smaller, Spearman on STS-B dev at most {LOSS} lower"
)
TEXT = "wikitext2:train,sst2:train,movie_reviews,subjectivity"
"""What compensated rounding reads; sentences of STS-B are taken out."""
TABLE = {"method": "low_bit", "bits": 4, "group": 64}
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "table 4 bits, maps int8": (TABLE, {"method": "low_bit"}, True),
    "table 4 bits, maps int8 with static inputs": (TABLE, {"method": "low_bit", "activations": "static"}, False),
    "table 4 bits, maps 4 bits": (TABLE, {"method": "low_bit", "bits": 4}, False),
    "table 4 bits, maps 4 bits to nearest": (TABLE, {"method": "low_bit", "bits": 4, "compensate": False}, False),
    "table 4 bits, maps 3 bits": (TABLE, {"method": "low_bit", "bits": 3}, False),
    "table 4 bits, maps nf4": (TABLE, {"method": "low_bit", "bits": 4, "number": "nf4"}, False),
}
"""Table, maps, and whether it is what was promised."""


def main() -> int:
    arguments = options(CLAIM)
    source = resolve("minilm")
    tokenizer = open_tokenizer(source)
    texts = calibration_texts(
        "builtin" if arguments.quick else TEXT, [scored_pairs("stsb"), scored_pairs("stsb", "train")]
    )
    limit = {"limit": 200} if arguments.quick else {}

    def spearman(model: Any) -> Quantity:
        return taut.evaluate(model, "sts", tokenizer=tokenizer, **limit)[0].quantity

    dense, size = spearman(taut.load("minilm")), folder_bytes(source.folder).total
    rows: list[dict[str, Any]] = [{"model": "dense", "file bytes": size, "spearman": dense.value}]
    for label, (table, maps, promised) in RECIPES.items():
        if arguments.quick and not promised:
            continue
        recipe = {"embedding": table, "projection": maps, "feedforward": maps}
        model = compress(prepare(source, Recipe.parse(recipe)), texts)
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "light", source.folder)
            small = folder_bytes(Path(folder) / "light").total
        found = spearman(model)
        gap = paired_bootstrap(found.samples, dense.samples)
        change = Quantity(value=gap.value, unit="", how="paired bootstrap over pairs", low=gap.low, high=gap.high)
        row = {"model": label, "file bytes": small, "smaller": size / small, "spearman": found.value, "change": change}
        if promised:
            row["holds"] = size / small >= SMALLER and dense.value - found.value <= LOSS
        rows.append(row)
    notes = f"maps: projection and feed-forward, all layers. Calibration: {len(texts)} texts of {TEXT}; one run"
    return record("whole_model", CLAIM, rows, all(row.get("holds", True) for row in rows), notes, arguments.quick)


if __name__ == "__main__":
    raise SystemExit(main())
