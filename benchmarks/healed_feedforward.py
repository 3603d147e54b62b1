"""minilm's feed-forward maps at half and a third of their parameters: how much healing on how much text brings back.
Needs TAUT_DATA.

The text holds no sentence of STS-B, of which neither the fit nor the healing has read anything. Judged on STS-B dev,
on retrieval of documentation, and on STS 2013. A point of the curve is a run of its own, its rate falling to zero at
its own end. ``--done FOLDER`` keeps every finished point there, so a run that was cut goes on; empty it when the code
has changed.
"""

import random
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from harness import options, record, seen

import taut
from taut.core.recipe import Recipe
from taut.core.record import Quantity
from taut.data import calibration_texts, scored_pairs
from taut.data.files import files_of, read
from taut.data.token_rows import text_rows
from taut.healing.heal import heal
from taut.studies.statistics import paired_bootstrap
from taut.surgery.apply import compress
from taut.surgery.loading import open_tokenizer, resolve
from taut.surgery.prepare import prepare

FIRST = 800
"""Pairs of STS-B dev, in the order of the file, that the targets were set on."""
TARGETS = {0.5: 0.896, 0.32: 0.88}
MINUTES = 30
CLAIM = (
    f"minilm, feed-forward maps of every layer, first {FIRST} pairs of STS-B dev (dense .9093): Spearman >= .896 at "
    f"keep .5 and >= .88 at keep .32 after at most {MINUTES} minutes of processor time"
)
TEXT = "wikitext2:train,text,sst2:train,movie_reviews,subjectivity,cola:train,imdb:dev"
STEPS = (0, 50, 100, 200)
CHOICES = {"train": "body", "learning_rate": 0.01, "length": 32, "batch": 64}
CALIBRATION = 500
"""Texts that the activation-aware fit reads."""


def main() -> int:
    arguments = options(CLAIM, keep=0.0, done="")
    source = resolve("minilm")
    tokenizer = open_tokenizer(source)
    judges = [scored_pairs("stsb", "train"), scored_pairs("stsb", "dev"), scored_pairs("sts13")]
    texts = calibration_texts("builtin" if arguments.quick else TEXT, judges)
    random.Random(0).shuffle(texts)
    original = taut.load("minilm")
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.csv"
        lines = read(files_of("stsb", "dev")[0][0]).splitlines()[:FIRST]
        first.write_text("\n".join(lines), encoding="utf-8")
        sts = {"first": str(first), "dev": "stsb", "sts13": "sts13"}

        def judged(model: Any) -> dict[str, tuple[float, ...]]:
            limit = {"limit": 50} if arguments.quick else {}
            found = {}
            for name, data in sts.items():
                (score,) = taut.evaluate(model, "sts", tokenizer=tokenizer, data=data, **limit)
                found[name] = score.quantity.samples
            score, *_ = taut.evaluate(model, "docs_retrieval", tokenizer=tokenizer, **limit)
            return found | {f"docs {score.metric}": score.quantity.samples}

        dense = judged(original)
        rows: list[dict[str, Any]] = [{"keep": 1.0, **{name: fmean(samples) for name, samples in dense.items()}}]
        for keep in TARGETS:
            if arguments.keep not in (0.0, keep):
                continue
            recipe = {"feedforward": {"method": "low_rank", "keep": keep, "layers": ":"}}
            for steps in (2,) if arguments.quick else STEPS:
                with seen(arguments.done, f"{recipe} {steps} {CHOICES} {TEXT}") as known:
                    if not known:
                        clock = time.process_time()
                        prepared = prepare(source, Recipe.parse(recipe))
                        plan, model = prepared.plan, compress(prepared, texts[:CALIBRATION])
                        enough = texts[: steps * CHOICES["batch"] + 10 * CHOICES["batch"]]
                        heal(model, original, enough, {"steps": steps, **CHOICES}, tokenizer=tokenizer, text=TEXT)
                        known["minutes"] = (time.process_time() - clock) / 60
                        known["kept"] = plan.after.parameters / plan.before.parameters
                        known["tokens"] = healing_tokens(tokenizer, enough, steps)
                        known |= judged(model)
                        print(keep, steps, known["minutes"], fmean(known["first"]), fmean(known["dev"]), flush=True)
                rows.append(row(keep, steps, known, dense))
    notes = (
        f"one seed; {TEXT}, no sentence of STS; {CHOICES}. 'minutes': processor time of fitting and healing, one "
        "thread. Change: of Spearman on all of STS-B dev, paired bootstrap over pairs"
    )
    reached = {keep: [each for each in rows if each["keep"] == keep and each["holds"]] for keep in TARGETS}
    return record(
        "healed_feedforward", CLAIM, rows, all(reached.values()), notes, arguments.quick or arguments.keep != 0.0
    )


def row(keep: float, steps: int, known: dict[str, Any], dense: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """One point of a curve; ``holds`` when it reaches its target in time."""
    gap = paired_bootstrap(known["dev"], dense["dev"])
    change = Quantity(value=gap.value, unit="", how="paired bootstrap", low=gap.low, high=gap.high)
    scores = {name: fmean(known[name]) for name in dense}
    found = {
        "keep": keep,
        "kept": known["kept"],
        "steps": steps,
        "tokens": known["tokens"],
        "minutes": known["minutes"],
    }
    holds = scores["first"] >= TARGETS[keep] and known["minutes"] <= MINUTES
    return found | scores | {"change": change, "target": TARGETS[keep], "holds": holds}


def healing_tokens(tokenizer: Any, texts: list[str], steps: int) -> int:
    """How many tokens so many steps read, each row of the text coming up equally often."""
    rows = text_rows(tokenizer, texts, CHOICES["length"])
    return round(sum(map(len, rows)) / len(rows) * steps * CHOICES["batch"])


if __name__ == "__main__":
    raise SystemExit(main())
