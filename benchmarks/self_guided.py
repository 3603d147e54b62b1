"""Does a guide make up for what structured feed-forward maps lose? Small decoders from scratch, several seeds.

First the gate: where dense maps do not beat low-rank ones clearly, feed-forward capacity does not bind, and there is
nothing for a guide to make up for. With ``--grow inner`` (or ``steps``) the setting is then doubled, up to ``--levels``
times. Past the gate every arm gets the same grid of learning rates, of which the first seed chooses one, and is judged
there over all seeds.

Every finished run keeps its record in ``--folder``, a run that is cut off goes on where it was, so the same command may
be stopped and repeated over days. ``--limit 5`` does at most five more runs. Needs TAUT_DATA for the text.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from harness import options, record

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


Run = tuple[Setting, str, float, int]
"""Setting, arm, learning rate, seed."""


class Bench:
    """Runs arms, or reads what they gave."""

    def __init__(self, arguments: Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.rates = [float(rate) for rate in arguments.rates.split(",")]
        self.left = arguments.limit or math.inf
        self.done: dict[Run, dict[str, Any]] = {}

    def best(self, setting: Setting, arms: Sequence[str]) -> dict[str, tuple[float, list[float]]]:
        """Of each arm the rate that served the first seed best, and the final held-out loss of every seed there."""
        self._run([(setting, arm, rate, 0) for arm in arms for rate in self.rates])
        chosen = {arm: min(self.rates, key=lambda rate: self._loss((setting, arm, rate, 0))) for arm in arms}
        seeds = range(self.arguments.seeds)
        self._run([(setting, arm, rate, seed) for arm, rate in chosen.items() for seed in seeds])
        return {arm: (rate, [self._loss((setting, arm, rate, seed)) for seed in seeds]) for arm, rate in chosen.items()}

    def rows(self) -> list[dict[str, Any]]:
        """One for each run, in the order in which they were asked for."""
        rows = []
        for (setting, arm, rate, seed), facts in self.done.items():
            row = {"setting": setting.name, "arm": arm, "rate": rate, "seed": seed}
            row |= {"loss": facts["evaluations"][-1]["loss"], "parameters": facts["parameters"]}
            rows.append(row | {"guided": (facts["guide"] or {}).get("steps", 0), **facts["spent"]})
        return rows

    def _loss(self, run: Run) -> float:
        return self.done[run]["evaluations"][-1]["loss"]

    def _run(self, runs: list[Run]) -> None:
        """Do what was not done yet. Raises Unfinished when more would be needed than the limit allows."""
        missing = [run for run in runs if run not in self.done]
        new = [run for run in missing if not (self._folder(run) / "training.json").is_file()]
        allowed = missing if len(new) <= self.left else [run for run in missing if run not in new[int(self.left) :]]
        self.left -= len(new)
        specs = [self._spec(run) for run in allowed]
        with ProcessPoolExecutor(self.arguments.processes, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(train, specs, map(self._folder, allowed), repeat(self.arguments.device)))
        for run, (status, facts) in zip(allowed, found, strict=True):
            if status == "interrupted":
                raise Unfinished
            if status == "failed":
                raise SystemExit(f"{self._folder(run)}: {facts['reason']}; leave this rate out")
            self.done[run] = facts
        if len(allowed) < len(missing):
            raise Unfinished

    def _folder(self, run: Run) -> Path:
        setting, arm, rate, seed = run
        return self.folder / setting.name / f"{arm.replace(',', '').replace(' ', '-')}-rate{rate:g}-seed{seed}"

    def _spec(self, run: Run) -> dict[str, Any]:
        setting, arm, rate, seed = run
        spec: dict[str, Any] = {
            "model": setting.model,
            "tokenizer": str(self.tokenizer()),
            "text": self.arguments.text,
            "length": 128,
            "batch": self.arguments.batch,
            "learning_rate": rate,
            "seed": seed,
            "budget": {"steps": setting.steps},
            "evaluate": {"every": 0.25, "tokens": 100_000},
        }
        if arm != "dense":
            method = {"method": self.arguments.method, "keep": self.arguments.keep, "layers": "1:"}
            spec["recipe"] = {"feedforward": method}
        if arm == "low rank, guided":
            spec["guide"] = {"mode": "fixed_steps"}
        elif arm == "low rank, guided to dense FLOPs":
            spec["guide"] = {"mode": "matched_flops"}
        elif arm == "low rank, longer to dense FLOPs":
            # The same for every rate and seed; the gate comes first.
            dense = next(facts for run, facts in self.done.items() if run[:2] == (setting, "dense"))
            spec["budget"] = {"flops": dense["spent"]["flops"]}
        return spec

    def tokenizer(self) -> Path:
        """Trained once, for all runs alike."""
        folder = self.folder / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            spec = TrainSpec.load({"model": "llama", "text": self.arguments.text, "budget": {"steps": 1}})
            byte_level(self.arguments.vocabulary, read_corpus(spec).learned).save_pretrained(folder)
        return folder


def train(spec: dict[str, Any], out: Path, device: str) -> tuple[str, dict[str, Any]]:
    """One run, or what it gave before. The weights go: the record is what counts, and there are many runs."""
    torch.set_num_threads(1)
    if not (out / "training.json").is_file():
        print(f"{out.parent.name}: {out.name}", flush=True)
    done = taut.train(spec, out, device=device)
    for weights in out.glob("*.safetensors"):
        weights.unlink()
    return done.status, done.record


def ahead(a: list[float], b: list[float]) -> tuple[float, float]:
    """How much lower ``a`` is than ``b``, and the standard error of that; seeds are paired."""
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def settings(arguments: Namespace) -> Iterator[Setting]:
    """The first one, and what it grows to."""
    setting = Setting(arguments.width, arguments.layers, arguments.inner or 4 * arguments.width, arguments.steps)
    yield setting
    for _ in range(arguments.levels):
        grown = {"inner": setting.inner, "steps": setting.steps}
        grown[arguments.grow] *= 2
        setting = Setting(setting.width, setting.layers, grown["inner"], grown["steps"])
        yield setting


def tell(arm: str, rate: float, losses: list[float], low_rank: list[float]) -> str:
    gap, error = ahead(losses, low_rank)
    against = "" if arm == "low rank" else f", {gap:+.4f} ± {error:.4f} ahead of low rank"
    return f"{arm} at {rate:g}: {statistics.mean(losses):.4f}{against}"


def study(bench: Bench, arguments: Namespace) -> list[str]:
    """What was found, in sentences."""
    found: list[str] = []
    for setting in settings(arguments):
        best = bench.best(setting, GATE)
        gap, error = ahead(best["dense"][1], best["low rank"][1])
        verdict = "binds" if gap > CLEAR * error else "does NOT bind"
        found.append(f"{setting.name}: feed-forward capacity {verdict}: dense ahead by {gap:.4f} ± {error:.4f}")
        if gap <= CLEAR * error:
            continue
        best |= bench.best(setting, [arm for arm in ARMS if arm not in best])
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
    arguments = options(
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
        processes=2,
    )
    if arguments.seeds < 2 or arguments.grow not in ("inner", "steps"):
        raise SystemExit("--seeds is at least 2 (3 for a record), --grow is inner or steps")
    if arguments.quick:
        small = {"width": 32, "layers": 2, "steps": 12, "batch": 4, "seeds": 2, "levels": 0}
        arguments = Namespace(**{**vars(arguments), **small, "text": "builtin", "rates": "2e-3", "vocabulary": 300})
        arguments.folder += "-quick"
    bench = Bench(arguments, Path(arguments.folder).absolute())
    try:
        found = study(bench, arguments)
    except (Unfinished, KeyboardInterrupt):
        print(f"{len(bench.done)} runs are kept in {bench.folder}; the same command goes on from there")
        return 130
    notes = "; ".join(found) + f". Loss: nats a token of held-out text; FLOPs: {TRAINING} x forward, guides included"
    return record("self_guided", CLAIM, bench.rows(), None, notes, arguments.quick, arguments.device)


if __name__ == "__main__":
    raise SystemExit(main())
