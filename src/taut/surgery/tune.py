"""``taut.tune``: measures where a dense copy of a structured map is faster than the map itself, on this machine.

Structured maps read and multiply less. Still, for some numbers of tokens, shapes and threads, a plain product is
faster. Pre-merging (Wei et al. 2024, arXiv 2406.16450, section 4) keeps both forms. Changed: the choice between them is
measured for every shape and number of threads, not set at a fixed number of tokens.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from taut.core.environment import processor
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.table import clip
from taut.measurement.clock import compare, ratio
from taut.methods.part import LinearPart, TokenRanges
from taut.surgery.apply import surgery_of
from taut.surgery.dense_copies import install_dense_copies
from taut.surgery.loading import open_model, resolve

TOKENS = tuple(2**power for power in range(11))
"""The numbers of tokens to measure: 1, 2, 4, ... 1024. Any other number is treated like the nearest."""
MARGIN = 1.03
"""How many times faster the dense copy must be to be worth its memory."""
REPEATS = 15


@dataclass(frozen=True)
class Tuning:
    """The result of tuning.

    ``rows``: one for each kind of map, number of threads and number of tokens, with ``speed``: how many times faster
    the map is than its dense copy. ``chosen``: what config.json stores.
    """

    rows: tuple[dict[str, Any], ...]
    chosen: dict[str, Any]

    @property
    def copies(self) -> tuple[str, ...]:
        """The sites that keep a dense copy."""
        return tuple(self.chosen["sites"])

    def __repr__(self) -> str:
        maps = len({row["map"] for row in self.rows})
        threads = ", ".join(str(number) for number in sorted({row["threads"] for row in self.rows}))
        amounts = f"{maps} kinds of maps, threads {threads}: {len(self.copies)} sites keep a dense copy"
        return clip(f"Tuning({amounts})")

    def to_dict(self) -> dict[str, Any]:
        """Return one dict for scripts."""
        rows = [{**row, "speed": row["speed"].model_dump()} for row in self.rows]
        return {"rows": rows, "tuned": self.chosen, "copies": list(self.copies)}


def tune(
    model: "PreTrainedModel | str | Path",
    threads: Sequence[int] = (),
    tokens: Sequence[int] = TOKENS,
    progress: Progress | None = None,
) -> Tuning:
    """Measure every structured map of a compressed model or folder, and store where a dense copy is faster.

    A model in memory uses its copies from now on. A folder stores the result in its config.json, and makes the copies
    whenever it is opened on the same kind of processor. A copy costs the memory of the dense map. It is dropped when
    its part is trained. ``threads``: numbers of threads to measure, by default the current one. With other numbers of
    threads the map itself is used. Raises TautError for a model that is not compressed or holds no such map, and for
    wrong ``tokens``.
    """
    if isinstance(model, str | Path):
        folder = resolve(model).folder
        if folder is None:
            raise TautError(f"{model}: tune needs a compressed folder, or a model in memory")
        tuning = tune(open_model(resolve(folder)), threads, tokens, progress)
        _write(folder, tuning.chosen)
        return tuning
    kinds = _kinds(model)
    if not kinds:
        raise TautError("tune: no map here has a dense equivalent to compare with; low_rank and block methods do")
    if not tokens or min(tokens) < 1:
        raise TautError(f"tune: tokens = {list(tokens)}: expected at least one number, each at least 1")
    tokens, threads = sorted(set(tokens)), sorted(set(threads or (torch.get_num_threads(),)))
    rows: list[dict[str, Any]] = []
    sites: dict[str, dict[str, list[list[int]]]] = {}
    for label, names in kinds.items():
        part = model.get_submodule(names[next(iter(names))])
        measured: list[dict[str, Any]] = []
        for used in threads:
            measured += measure_part(part, tokens, used)
            if progress is not None:
                progress(len(rows) // len(tokens) + len(measured) // len(tokens), len(kinds) * len(threads))
        rows += [{"map": label, "sites": len(names), **row} for row in measured]
        ranges = dense_ranges(measured, tokens)
        if ranges:
            plain = {str(used): [list(pair) for pair in pairs] for used, pairs in ranges.items()}
            sites |= dict.fromkeys(names, plain)
    chosen = {"processor": processor(), "device": model.device.type, "sites": sites}
    model.hf_quantizer.quantization_config.tuned = chosen
    install_dense_copies(model, surgery_of(model).steps, chosen)
    return Tuning(tuple(rows), chosen)


def dense_ranges(rows: Sequence[dict[str, Any]], tried: Sequence[int]) -> TokenRanges:
    """Find where the copy is ``MARGIN`` faster, from one part's rows: by threads, (first, last) numbers of tokens."""
    ranges: dict[int, tuple[tuple[int, int], ...]] = {}
    for used in dict.fromkeys(row["threads"] for row in rows):
        slower = [row["tokens"] for row in rows if row["threads"] == used and row["speed"].value < 1 / MARGIN]
        if slower:
            ranges[used] = token_ranges(slower, tried)
    return ranges


def token_ranges(chosen: Sequence[int], tried: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Find the numbers of tokens whose nearest in ``tried`` (by ratio) is one of ``chosen``.

    Returns ranges as (first, last) pairs; a last of -1 means no end.
    """
    ranges: list[tuple[int, int]] = []
    for number, count in enumerate(tried):
        if count not in chosen:
            continue
        first = 1 if number == 0 else math.isqrt(tried[number - 1] * count) + 1
        last = -1 if number + 1 == len(tried) else math.isqrt(count * tried[number + 1])
        if ranges and ranges[-1][1] == first - 1:
            first = ranges.pop()[0]
        ranges.append((first, last))
    return tuple(ranges)


def _kinds(model: PreTrainedModel) -> dict[str, dict[str, str]]:
    """Group maps that take the same time, by a label for people: the names and paths of their sites."""
    kinds: dict[str, dict[str, str]] = {}
    for step in surgery_of(model).steps:
        module = model.get_submodule(step.site.path)
        if isinstance(module, LinearPart) and module.may_keep_dense_copy:
            bias = "" if module.bias is None else " + bias"
            label = f"{step.label}, {module.in_features} -> {module.out_features}{bias}, {module.dtype}"
            kinds.setdefault(label.replace("torch.", ""), {})[step.site.name] = step.site.path
    return kinds


@torch.inference_mode()
def measure_part(part: LinearPart, tokens: Sequence[int], threads: int) -> list[dict[str, Any]]:
    """Measure a part for each number of ``tokens``.

    A row holds ``threads``, ``tokens`` and ``speed``: how many times faster the part is than its dense copy, a Quantity
    with its interval.
    """
    dense = part.merged().to(part.dtype).contiguous()
    rows = []
    for count in tokens:
        x = torch.randn(count, part.in_features, device=dense.device, dtype=part.dtype)
        cases = {"map": lambda x=x: part.product(x), "dense": lambda x=x: F.linear(x, dense, part.bias)}
        times = compare(cases, repeats=REPEATS, threads=threads, device=dense.device)
        rows.append({"threads": threads, "tokens": count, "speed": ratio(times["dense"], times["map"])})
    return rows


def _write(folder: Path, chosen: dict[str, Any]) -> None:
    """Write ``chosen`` into config.json, whole or not at all."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["tuned"] = chosen
    fresh = path.with_name("config.json.new")
    fresh.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    fresh.replace(path)
