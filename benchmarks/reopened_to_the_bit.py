"""Compressed folders of real models, opened in a new process by the tools that people use. Needs TAUT_MODELS."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import options, record
from openers import SENTENCES, answers
from real_models import MINILM, STORIES, location, recipes
from transformers import AutoTokenizer, PreTrainedModel

import taut

CLAIM = "reopened in a new process, minilm and stories260K give the same outputs to the bit; without taut they raise"
TASK = "two_sentences"
SOUND = ("sha256 ", "[-")
"""How an answer starts that is not an error: a digest, or log-likelihoods."""


def main() -> int:
    arguments = options(CLAIM)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_task(root)
        for name in (STORIES, MINILM):
            rows += rows_of(name, root, arguments.quick)
    notes = (
        "yes: the SHA-256 of the output (hidden states, logits, greedy text, vectors, log-likelihoods) equals that of "
        "the model in memory that the folder was saved from; one thread. lm-eval runs as 'taut run -- lm_eval'. loud: "
        "without taut every one of these tools raises. transformers: a tensor has another shape; lm-eval asks no "
        "further than the name of the quantization, so it is tried on the first folder only"
    )
    return record("reopened_to_the_bit", CLAIM, rows, all(row["holds"] for row in rows), notes, arguments.quick)


def rows_of(name: str, root: Path, quick: bool) -> list[dict[str, Any]]:
    """Every recipe: saved here, opened in a process with taut, and in one without."""
    where = location(name)
    here: dict[Path, dict[str, str]] = {}
    for label, recipe in recipes(where, quick).items():
        folder = root / name / label.replace(" ", "_")
        model = taut.apply(where, recipe, folder)
        here[folder] = answers(folder, model)
        if name == STORIES:
            here[folder]["lm-eval"] = likelihoods_here(model, folder, root)
    there, refused = opened("taut", here), opened("json", here)
    rows = []
    for folder, found in here.items():
        if name == STORIES:
            there[folder]["lm-eval"] = likelihoods(folder, root, with_taut=True)
        if name == STORIES and not rows:
            refused[folder]["lm-eval"] = likelihoods(folder, root, with_taut=False)
        same = {tool: bits == there[folder][tool] and bits.startswith(SOUND) for tool, bits in found.items()}
        loud = all(is_error(error) for error in refused[folder].values())
        row = {"model": name, "recipe": folder.name, **same, "loud": loud, "holds": all(same.values()) and loud}
        rows.append(row)
    return rows


def is_error(found: str) -> bool:
    """Whether a tool refused the folder for what it is, and not for some accident."""
    return "ignore_mismatched_sizes" in found or "Unknown quantization type, got taut" in found


def opened(package: str, folders: Iterable[Path]) -> dict[Path, dict[str, str]]:
    """What the stock tools give for each folder in a new process that imports ``package`` first."""
    code = f"import {package}, runpy; runpy.run_module('openers', run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    if line is None:
        raise RuntimeError(f"the opening process said: {done.stderr[-2000:]}")
    return {Path(folder): found for folder, found in json.loads(line.removeprefix("ANSWERS ")).items()}


def write_task(root: Path) -> None:
    """A task for lm-eval on local data: how likely is the second half of each sentence after the first?"""
    rows = []
    for sentence in SENTENCES:
        words = sentence.split()
        rows.append({"text": " ".join(words[:10]), "target": " " + " ".join(words[10:])})
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{target}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    }
    (root / "task.yaml").write_text(yaml.safe_dump(task))


def likelihoods(folder: Path, root: Path, with_taut: bool) -> str:
    """The log-likelihoods that lm-eval writes for a folder, as text to the last digit; or its last words."""
    out = Path(tempfile.mkdtemp(dir=root))
    command = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={folder},dtype=float32", "--tasks", TASK]
    command += ["--include_path", str(root), "--device", "cpu", "--batch_size", "1", "--log_samples"]
    command += ["--output_path", str(out)]
    beside = Path(sys.executable).parent
    command = [str(beside / "taut"), "run", "--", *command] if with_taut else [str(beside / command[0]), *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    lines = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
    return str([float(json.loads(line)["resps"][0][0][0]) for line in lines])


def likelihoods_here(model: PreTrainedModel, folder: Path, root: Path) -> str:
    """The same task run by lm-eval on the model in memory."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tokenizer = AutoTokenizer.from_pretrained(folder)
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1)
    manager = TaskManager(include_path=str(root), include_defaults=False)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=[TASK], task_manager=manager, bootstrap_iters=0)
    return str([float(sample["resps"][0][0][0]) for sample in found["samples"][TASK]])


if __name__ == "__main__":
    raise SystemExit(main())
