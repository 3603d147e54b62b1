"""Does a guide make up for what structured feed-forward maps lose? Small decoders from scratch, several seeds.

First the gate: where dense maps do not beat low-rank ones clearly, feed-forward capacity does not bind, and there is
nothing for a guide to make up for. With ``--grow inner`` (or ``steps``) the setting is then doubled, up to ``--levels``
times. Past the gate every arm gets the same grid of learning rates and seeds, and is judged at its best rate.

Every finished run keeps its record in ``--folder``, a run that is cut off goes on where it was, so the same command may
be stopped and repeated over days. ``--limit 5`` does at most five more runs. Needs TAUT_DATA for the text.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import options, record
from rich.console import Console

import taut
from taut.training.corpus import read_corpus
from taut.training.flops import TRAINING
from taut.training.spec import TrainSpec
from taut.training.tokenizer import byte_level

CLAIM = "self-guided training: low-rank feed-forward maps with a guide end between low rank alone and dense"
CLEAR = 2.0
"""Standard errors that the dense arm must be ahead by."""
GATE = ("dense", "low rank")
ARMS = (*GATE, "low rank, guided", "low rank, guided to dense FLOPs", "low rank, longer to dense FLOPs")


@dataclass(frozen=True)
class Setting:
    """Sizes of one level of the experiment."""

    width: int
    layers: int
    inner: int
    steps: int

    @property
    def name(self) -> str:
        return f"width{self.width}-layers{self.layers}-inner{self.inner}-steps{self.steps}"

    @property
    def model(self) -> str:
        return (
            f"llama:hidden_size={self.width},num_hidden_layers={self.layers},intermediate_size={self.inner},"
            f"num_attention_heads={self.width // 32},max_position_embeddings=128,tie_word_embeddings=true"
        )


class Unfinished(Exception):
    """The limit of runs is reached, or the user stopped."""


class Bench:
    """Runs arms, or reads what they gave."""

    def __init__(self, given: Namespace, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.rates = [float(rate) for rate in given.rates.split(",")]
        self.left = given.limit or math.inf
        self.rows: list[dict[str, Any]] = []

    def losses(self, setting: Setting, arm: str, rate: float) -> list[float]:
        """The final held-out loss of every seed."""
        return [self._run(setting, arm, rate, seed)["evaluations"][-1]["loss"] for seed in range(self.given.seeds)]

    def best(self, setting: Setting, arm: str) -> tuple[float, list[float]]:
        """The rate with the lowest mean, and its losses."""
        found = {rate: self.losses(setting, arm, rate) for rate in self.rates}
        rate = min(found, key=lambda rate: statistics.mean(found[rate]))
        return rate, found[rate]

    def _run(self, setting: Setting, arm: str, rate: float, seed: int) -> dict[str, Any]:
        out = self.folder / setting.name / f"{arm.replace(',', '').replace(' ', '-')}-rate{rate:g}-seed{seed}"
        if not (out / "training.json").is_file():
            if self.left < 1:
                raise Unfinished
            self.left -= 1
            Console().print(f"{setting.name}: {arm}, rate {rate:g}, seed {seed}", highlight=False)
        done = taut.train(self._spec(setting, arm, rate, seed), out, device=self.given.device)
        if done.status == "interrupted":
            raise Unfinished
        if done.status == "failed":
            raise SystemExit(f"{out}: {done.record['reason']}; leave this rate out")
        for weights in out.glob("*.safetensors"):
            # The record is what counts, and there are many runs.
            weights.unlink()
        facts = done.record
        spent, guide = facts["spent"], facts["guide"] or {}
        row = {
            "setting": setting.name,
            "arm": arm,
            "rate": rate,
            "seed": seed,
            "loss": facts["evaluations"][-1]["loss"],
        }
        row |= {"parameters": facts["parameters"], "guided": guide.get("steps", 0), **spent}
        if row not in self.rows:
            self.rows.append(row)
        return facts

    def _spec(self, setting: Setting, arm: str, rate: float, seed: int) -> dict[str, Any]:
        spec: dict[str, Any] = {
            "model": setting.model,
            "tokenizer": str(self.tokenizer()),
            "text": self.given.text,
            "length": 128,
            "batch": self.given.batch,
            "learning_rate": rate,
            "seed": seed,
            "budget": {"steps": setting.steps},
            "evaluate": {"every": 0.25, "tokens": 100_000},
        }
        if arm != "dense":
            method = {"method": self.given.method, "keep": self.given.keep, "layers": "1:"}
            spec["recipe"] = {"feedforward": method}
        if arm == "low rank, guided":
            spec["guide"] = {"mode": "fixed_steps"}
        elif arm == "low rank, guided to dense FLOPs":
            spec["guide"] = {"mode": "matched_flops"}
        elif arm == "low rank, longer to dense FLOPs":
            dense = self._run(setting, "dense", rate, seed)["spent"]["flops"]
            spec["budget"] = {"flops": dense}
        return spec

    def tokenizer(self) -> Path:
        """Trained once, for all runs alike."""
        folder = self.folder / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            spec = TrainSpec.load({"model": "llama", "text": self.given.text, "budget": {"steps": 1}})
            byte_level(self.given.vocabulary, read_corpus(spec).learned).save_pretrained(folder)
        return folder


def ahead(a: list[float], b: list[float]) -> tuple[float, float]:
    """How much lower ``a`` is than ``b``, and the standard error of that; seeds are paired."""
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def settings(given: Namespace) -> Iterator[Setting]:
    """The first one, and what it grows to."""
    setting = Setting(given.width, given.layers, given.inner or 4 * given.width, given.steps)
    yield setting
    for _ in range(given.levels):
        grown = {"inner": setting.inner, "steps": setting.steps}
        grown[given.grow] *= 2
        setting = Setting(setting.width, setting.layers, grown["inner"], grown["steps"])
        yield setting


def tell(arm: str, rate: float, losses: list[float], low_rank: list[float]) -> str:
    gap, error = ahead(losses, low_rank)
    against = "" if arm == "low rank" else f", {gap:+.4f} ± {error:.4f} ahead of low rank"
    return f"{arm} at {rate:g}: {statistics.mean(losses):.4f}{against}"


def study(bench: Bench, given: Namespace) -> list[str]:
    """What was found, in sentences."""
    found: list[str] = []
    for setting in settings(given):
        best = {arm: bench.best(setting, arm) for arm in GATE}
        gap, error = ahead(best["dense"][1], best["low rank"][1])
        verdict = "binds" if gap > CLEAR * error else "does NOT bind"
        found.append(f"{setting.name}: feed-forward capacity {verdict}: dense ahead by {gap:.4f} ± {error:.4f}")
        if gap <= CLEAR * error:
            continue
        best |= {arm: bench.best(setting, arm) for arm in ARMS if arm not in best}
        found += [tell(arm, *best[arm], best["low rank"][1]) for arm in ARMS]
        guided, rank, dense = (statistics.mean(best[arm][1]) for arm in (ARMS[3], ARMS[1], ARMS[0]))
        gap, error = ahead(best[ARMS[3]][1], best["low rank"][1])
        between = dense < guided and gap > CLEAR * error
        share = (rank - guided) / (rank - dense)
        found.append(
            f"the published order {'is' if between else 'is NOT'} reproduced here: the guide makes up for {share:.0%}"
        )
        return found
    return [*found, "no setting was found where a guide could have anything to make up for"]


def main() -> int:
    given = options(
        CLAIM,
        folder="runs/self_guided",
        text="text",
        method="low_rank",
        keep=0.32,
        width=256,
        layers=4,
        inner=0,
        steps=1500,
        batch=16,
        vocabulary=1024,
        rates="1e-3,2e-3,4e-3",
        seeds=3,
        grow="inner",
        levels=2,
        limit=0,
    )
    if given.seeds < 2 or given.grow not in ("inner", "steps"):
        raise SystemExit("--seeds is at least 2 (3 for a record), --grow is inner or steps")
    if given.quick:
        small = {"width": 32, "layers": 2, "steps": 12, "batch": 4, "seeds": 2, "levels": 0}
        given = Namespace(**{**vars(given), **small, "text": "builtin", "rates": "2e-3", "vocabulary": 300})
        given.folder += "-quick"
    bench = Bench(given, Path(given.folder).absolute())
    try:
        found = study(bench, given)
    except Unfinished:
        print(f"{len(bench.rows)} runs are kept in {bench.folder}; the same command goes on from there")
        return 130
    notes = "; ".join(found) + f". Loss: nats a token of held-out text; FLOPs: {TRAINING} x forward, guides included"
    return record("self_guided", CLAIM, bench.rows, None, notes, given.quick)


if __name__ == "__main__":
    raise SystemExit(main())
