"""What compressing costs all-MiniLM-L6-v2 on the development set of STS-B. Needs TAUT_DATA."""

from typing import Any

from harness import options, record

import taut
from taut.core.record import Quantity, Score
from taut.studies.statistics import paired_bootstrap
from taut.surgery.loading import open_tokenizer, resolve

DENSE, DECIMALS = 0.8672, 4
CLAIM = "minilm on STS-B dev: dense .8672; int8 table within .001, int4 groups of 64 within .002, int8 linears .003"
UNCHANGED = dict.fromkeys(("embedding", "projection", "attention", "feedforward"), "identity")
RECIPES: dict[str, tuple[Any, float | None]] = {
    "identity": (UNCHANGED, 0.0),
    "table int8": ("table_int8", 0.001),
    "table int4, groups of 64": ("table_int4", 0.002),
    "linears int8": ("linears_int8", 0.003),
    "table int4, rows": ({"embedding": {"method": "low_bit", "bits": 4}}, None),
    "table and linears int8": ("all_int8", None),
    "table low-rank .5": ("table_low_rank", None),
    "feed-forward low-rank .75": ("feedforward_low_rank", None),
}
"""Recipe, and how far from dense its score may be."""


def main() -> int:
    arguments = options(CLAIM)
    tokenizer = open_tokenizer(resolve("minilm"))
    limit = {"limit": 200} if arguments.quick else {}

    def spearman(recipe: Any = None) -> Score:
        model = taut.load("minilm") if recipe is None else taut.apply("minilm", recipe)
        return taut.evaluate(model, "sts", tokenizer=tokenizer, **limit)[0]

    dense = spearman()
    value = dense.quantity.value
    rows = [{"recipe": "dense", "spearman": value, "target": DENSE, "holds": round(value, DECIMALS) == DENSE}]
    if arguments.quick:
        # The figure is for all 1500 pairs.
        rows[0] |= {"target": None, "holds": True}
    for name, (recipe, within) in RECIPES.items():
        found = spearman(recipe).quantity
        gap = paired_bootstrap(found.samples, dense.quantity.samples)
        how = f"paired bootstrap over {len(found.samples)} pairs of sentences"
        change = Quantity(value=gap.value, unit="", how=how, low=gap.low, high=gap.high)
        row = {"recipe": name, "spearman": found.value, "change": change}
        if within is not None:
            row |= {"target": within, "holds": abs(found.value - value) <= within}
        rows.append(row)
    facts = ", ".join(f"{key} {value}" for key, value in dense.data.items())
    baselines = ", ".join(f"{key} {value:.4f}" for key, value in dense.baselines.items())
    notes = (
        f"'holds': the change of the score itself; the interval says how sure it is. {facts}. Shortcuts: {baselines}"
    )
    passed = all(row.get("holds", True) for row in rows)
    return record("minilm_sts", CLAIM, rows, passed, notes, arguments.quick)


if __name__ == "__main__":
    raise SystemExit(main())
