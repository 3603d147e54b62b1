"""How little a token table can be written in: minilm on the development set of STS-B, as fitted and healed. Needs
TAUT_DATA. Every byte of the table counts: codes, codebooks, lengths, maps.

Constants of the fit were chosen on pairs of STS-B, so STS 2013 stands beside, which nothing was chosen on.

``--done FOLDER`` keeps each seed's scores there: a run that was cut goes on, and runs with ``--only BITS`` side by side
leave a last one nothing but the table to do. Empty it when the code has changed.
"""

from statistics import fmean
from typing import Any

from harness import options, record, seen

import taut
from taut.core.recipe import Recipe
from taut.core.record import Quantity
from taut.data import calibration_texts, scored_pairs
from taut.healing.heal import heal
from taut.studies.statistics import paired_bootstrap
from taut.surgery.apply import compress
from taut.surgery.loading import open_tokenizer, resolve
from taut.surgery.prepare import prepare

CLAIM = (
    "minilm's table, loss of Spearman on STS-B dev, mean of 3 seeds: <= 2.2 bits: .0015 as fitted, .0005 healed; "
    "<= 1.2 bits: .006 and .002; <= 0.6 bits: .01 healed"
)
TEXT = "wikitext2:train,sst2:train,movie_reviews,subjectivity,trec"
"""What the fits and the healing read; sentences of STS-B are taken out."""
STEPS = 100
JUDGES = {"stsb": "dev", "sts13": None}
"""Pairs, and which of them: the first for the claim, the second for what it is worth elsewhere."""
PRODUCT = {"method": "product_quantized", "stages": 2, "store": {"method": "low_bit", "bits": 8}}
TWO_STAGE = {"method": "two_stage", "store": {"method": "low_bit", "bits": 4, "group": 64}}
RATES: dict[float, tuple[dict[str, Any], float | None, float]] = {
    2.2: (PRODUCT | {"keep": 2.2 / 32}, 0.0015, 0.0005),
    1.2: (TWO_STAGE | {"keep": 1.2 / 32, "subvector": 16, "fine_subvector": 8, "rank": 384}, 0.006, 0.002),
    0.6: (TWO_STAGE | {"keep": 0.6 / 32, "subvector": 32, "fine_subvector": 8, "rank": 256}, None, 0.01),
}
"""Bits a number at most: the recipe, and what may be lost as fitted and once healed. The methods are those that agree
most with the original at these rates in studies/embeddings.yaml, on other text."""


Shares = dict[str, tuple[float, ...]]
"""By set of pairs, each pair's share of Spearman's correlation."""


def main() -> int:
    arguments = options(CLAIM, seeds=3, steps=STEPS, only=0.0, done="")
    seeds, steps = (1, 4) if arguments.quick else (arguments.seeds, arguments.steps)
    limit = {"limit": 100} if arguments.quick else {}
    source = resolve("minilm")
    tokenizer = open_tokenizer(source)
    judges = [scored_pairs(name, split) for name, split in JUDGES.items()]
    texts = calibration_texts("builtin" if arguments.quick else TEXT, judges)

    def spearman(model: Any) -> Shares:
        found = {}
        for name, split in JUDGES.items():
            (score,) = taut.evaluate(model, "sts", tokenizer=tokenizer, data=name, split=split, **limit)
            found[name] = score.quantity.samples
        return found

    original = taut.load("minilm")
    dense = spearman(original)
    rows: list[dict[str, Any]] = [
        {"table": "dense", "pairs": name, "bits": 32.0, "spearman": fmean(dense[name])} for name in JUDGES
    ]
    for rate, (line, *within) in RATES.items():
        found: dict[str, list[Shares]] = {"as fitted": [], "healed": []}
        if arguments.only not in (0.0, rate):
            continue
        recipe = Recipe.parse({"embedding": line})
        prepared = prepare(source, recipe)
        step = prepared.plan.steps[0]
        bits = 8 * step.cost.bytes / (step.site.rows * step.site.width)
        for seed in range(seeds):
            with seen(arguments.done, f"{step.label} {steps} {seed}") as known:
                if not known:
                    model = compress(prepared, texts, seed=seed)
                    known["as fitted"] = spearman(model)
                    heal(model, original, texts, {"steps": steps, "seed": seed}, tokenizer=tokenizer, text=TEXT)
                    known["healed"] = spearman(model)
            for state, of in found.items():
                of.append(known[state])
            print(rate, seed, {state: fmean(of[-1]["stsb"]) for state, of in found.items()}, flush=True)
        for (state, of), target in zip(found.items(), within, strict=True):
            for name in JUDGES:
                row = {"table": f"{step.label}, {state}", "pairs": name, "bits": bits}
                row |= compared([one[name] for one in of], dense[name])
                if target is not None and name == "stsb":
                    row |= {"target": target, "holds": -row["change"].value <= target and bits <= rate}
                rows.append(row)
    notes = (
        f"'holds': the mean loss itself; the interval says how sure it is. {len(texts)} texts of {TEXT}, {steps} steps"
    )
    passed = all(row.get("holds", True) for row in rows)
    return record("table_targets", CLAIM, rows, passed, notes, arguments.quick or arguments.only != 0.0)


def compared(seeds: list[tuple[float, ...]], dense: tuple[float, ...]) -> dict[str, Any]:
    """Spearman's correlation, its change with a paired interval, and the change of every seed."""
    # A pair's share of the correlation, averaged over the seeds.
    pairs = [fmean(shares) for shares in zip(*seeds, strict=True)]
    gap = paired_bootstrap(pairs, dense)
    how = f"paired bootstrap over {len(pairs)} pairs, mean of {len(seeds)} seeds"
    change = Quantity(value=gap.value, unit="", how=how, low=gap.low, high=gap.high)
    each = " ".join(f"{fmean(shares) - fmean(dense):+.4f}" for shares in seeds)
    return {"spearman": fmean(pairs), "change": change, "seeds": each}


if __name__ == "__main__":
    raise SystemExit(main())
