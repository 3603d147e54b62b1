"""Tightened folders of real models, opened in a new process by the tools that people use. Needs TAUT_MODELS."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import options, record
from real_models import MINILM, STORIES, location, recipes
from stock_openers import SENTENCES, answers
from transformers import AutoTokenizer, PreTrainedModel

import taut

CLAIM = "reopened in a new process, minilm and stories260K give the same outputs to the bit; without taut they raise"
TASK = "two_sentences"


def main() -> int:
    given = options(CLAIM)
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_task(root)
        for name in (MINILM, STORIES):
            rows += rows_of(name, root, given.quick)
    tools = sorted({key for row in rows for key in row} - {"model", "recipe", "error", "holds"})
    notes = (
        "yes: SHA-256 of the output (hidden states, logits, greedy text, vectors, log-likelihoods) equals that of the "
        f"model in memory that the folder was saved from; one thread. Tools: {', '.join(tools)}. lm-eval runs as "
        "'taut run -- lm_eval'. loud: the same tools, without taut, all raise on a tensor of another shape"
    )
    return record("reopened_to_the_bit", CLAIM, rows, all(row["holds"] for row in rows), notes, given.quick)


def rows_of(name: str, root: Path, quick: bool) -> list[dict[str, Any]]:
    """Every recipe: saved here, opened in a process of its own with taut, and in one without."""
    where, rows = location(name), []
    for label, recipe in recipes(where, quick).items():
        folder = root / name / label
        model = taut.apply(where, recipe, folder)
        here = answers(folder, model)
        there = opened("taut", folder)
        if name == STORIES:
            here["lm-eval"] = likelihoods_here(model, folder, root)
            there["lm-eval"] = likelihoods(folder, root, with_taut=True)
        same = {tool: found == there[tool] and "Error" not in found for tool, found in here.items()}
        refused = opened("json", folder)
        if name == STORIES:
            refused["lm-eval"] = likelihoods(folder, root, with_taut=False)
        loud = all("mismatch" in error.lower() or "size" in error.lower() for error in refused.values())
        shown = next(iter(refused.values())).split("\n")[0]
        rows.append({"model": name, "recipe": label, **same, "loud": loud, "holds": all(same.values()) and loud})
        rows[-1]["refusal"] = shown
        print(name, label, same, loud, flush=True)
    return rows


def opened(package: str, folder: Path) -> dict[str, str]:
    """What the stock tools give for ``folder`` in a new process that imports ``package`` first."""
    code = f"import {package}, runpy; runpy.run_module('stock_openers', run_name='__main__')"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")), None)
    if line is None:
        raise RuntimeError(f"{folder}: the opening process said: {done.stderr[-2000:]}")
    return json.loads(line.removeprefix("ANSWERS "))[str(folder)]


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
