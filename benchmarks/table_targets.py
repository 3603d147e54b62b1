"""How little a token table can be written in: minilm on the development set of STS-B, as fitted and healed. Needs
TAUT_DATA. Every byte of the table counts: codes, codebooks, lengths, maps."""

from statistics import fmean
from typing import Any

from harness import options, record

import taut
from taut.comparison.statistics import paired_bootstrap
from taut.core.recipe import Recipe
from taut.core.record import Quantity
from taut.data import calibration_texts, scored_pairs
from taut.surgery.apply import steps_of, tighten
from taut.surgery.source import open_tokenizer, resolve
from taut.training.heal import heal

CLAIM = (
    "minilm's table, loss of Spearman on STS-B dev, mean of 3 seeds: <= 2.2 bits: .0015 as fitted, .0005 healed; "
    "<= 1.2 bits: .006 and .002; <= 0.6 bits: .01 healed"
)
TEXT = "wikitext2:train,sst2:train,movie_reviews,subjectivity,trec"
"""What the fits and the healing read; sentences of STS-B are taken out."""
STEPS = 200
STORE = {"method": "low_bit", "bits": 8}
RATES: dict[float, tuple[dict[str, Any], float | None, float]] = {
    2.2: ({"method": "product_quantized", "keep": 2.2 / 32, "store": STORE}, 0.0015, 0.0005),
    1.2: ({"method": "product_quantized", "keep": 1.2 / 32, "store": STORE}, 0.006, 0.002),
    0.6: ({"method": "product_quantized", "keep": 0.6 / 32, "store": STORE}, None, 0.01),
}
"""Bits a number at most: the recipe, and what may be lost as fitted and once healed."""


def main() -> int:
    given = options(CLAIM, seeds=3, steps=STEPS)
    seeds, steps = (1, 4) if given.quick else (given.seeds, given.steps)
    limit = {"limit": 100} if given.quick else {}
    source = resolve("minilm")
    tokenizer = open_tokenizer(source)
    texts = calibration_texts("builtin" if given.quick else TEXT, [scored_pairs("stsb", "dev")])

    def spearman(model: Any) -> tuple[float, ...]:
        return taut.evaluate(model, "sts", tokenizer=tokenizer, **limit)[0].quantity.samples

    original = taut.load("minilm")
    dense = spearman(original)
    rows = [{"table": "dense", "bits": 32.0, "spearman": fmean(dense)}]
    for rate, (line, fitted_within, healed_within) in RATES.items():
        found: dict[str, list[tuple[float, ...]]] = {"as fitted": [], "healed": []}
        for seed in range(seeds):
            model, _ = tighten(source, Recipe.parse({"embedding": line}), texts, seed=seed)
            step = steps_of(model)[0]
            bits = 8 * step.cost.bytes / (step.site.rows * step.site.width)
            found["as fitted"].append(spearman(model))
            heal(model, original, texts, {"steps": steps, "seed": seed}, tokenizer=tokenizer, text=TEXT)
            found["healed"].append(spearman(model))
        for state, within in (("as fitted", fitted_within), ("healed", healed_within)):
            # A pair's share of the correlation, averaged over the seeds.
            pairs = [fmean(shares) for shares in zip(*found[state], strict=True)]
            gap = paired_bootstrap(pairs, dense)
            how = f"paired bootstrap over {len(pairs)} pairs, mean of {seeds} seeds"
            change = Quantity(value=gap.value, unit="", how=how, low=gap.low, high=gap.high)
            row = {"table": f"{step.label}, {state}", "bits": bits, "spearman": fmean(pairs), "change": change}
            row["seeds"] = " ".join(f"{fmean(shares) - fmean(dense):+.4f}" for shares in found[state])
            if within is not None:
                row |= {"target": within, "holds": -gap.value <= within and bits <= rate}
            rows.append(row)
    notes = (
        f"'holds': the mean loss itself; the interval says how sure it is. {len(texts)} texts of {TEXT}, {steps} steps"
    )
    passed = all(row.get("holds", True) for row in rows)
    return record("table_targets", CLAIM, rows, passed, notes, given.quick)


if __name__ == "__main__":
    raise SystemExit(main())
