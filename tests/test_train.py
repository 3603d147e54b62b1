"""taut train: continuing a run that was cut off, what the folder says, and wrong input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from runs import LLAMA, LOW_RANK, SMALL, TEXT, small
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import taut
from taut.cli import app
from taut.core.errors import TautError
from taut.healing.runs import newest
from taut.training.corpus import read_corpus
from taut.training.objective import LanguageModelling
from taut.training.run import train
from taut.training.spec import TrainSpec
from taut.training.token_rows import spread, token_rows
from taut.training.trainer import TWICE, Stop


class Cut(BaseException):
    """Ends a run as abruptly as a kill."""


def cut_at(step: int):
    def progress(moment) -> None:
        if moment.step == step and not moment.evaluation:
            raise Cut

    return progress


def weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_a_whole_folder(tmp_path: Path) -> None:
    python, numbers = torch.random.get_rng_state(), []
    spec = small(tmp_path, recipe=LOW_RANK, save={"steps": 3})
    done = taut.train(spec, tmp_path / "out", progress=numbers.append)
    assert torch.equal(python, torch.random.get_rng_state())
    assert done.exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.txt"]
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record == done.record
    assert [entry["step"] for entry in record["evaluations"]] == [4, 8]
    assert len(record["losses"]) == record["spent"]["steps"] == 8
    assert record["spent"]["tokens"] == 8 * 4 * 16
    assert record["spent"]["flops"] == 8 * 4 * 16 * record["flops_per_token"]["model"]
    assert record["flops_per_token"]["model"] < record["flops_per_token"]["dense"]
    assert record["environment"]["packages"]["torch"]
    assert 0 < record["spent"]["seconds"] < 60
    assert [moment.step for moment in numbers if moment.evaluation] == [4, 8]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert taut.show(tmp_path / "out")["recipe"] == LOW_RANK
    assert model(**tokenizer("Number 3", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    # Again: nothing to do; another spec: refused.
    assert taut.train(spec, tmp_path / "out").record == record
    with pytest.raises(TautError, match=r"the result of another spec: save.steps was 3, now None"):
        taut.train(small(tmp_path, recipe=LOW_RANK), tmp_path / "out")


def test_what_a_spec_of_then_could_not_say_is_the_default(tmp_path: Path) -> None:
    spec = TrainSpec.load(small(tmp_path, recipe=LOW_RANK))
    then = {name: value for name, value in spec.to_dict().items() if name != "reconstruction"}
    assert spec.change(then) is None
    other = spec.model_copy(update={"reconstruction": 0.5})
    assert other.change(then) == "reconstruction was 0.0, now 0.5"


def test_the_loss_is_that_of_the_saved_model(tmp_path: Path) -> None:
    spec = TrainSpec.load(small(tmp_path))
    done = train(spec, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = spread(token_rows(read_corpus(spec).held, tokenizer, spec, False), spec.evaluate.tokens)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        loss = model(input_ids=rows.ids.long(), labels=rows.ids.long()).loss
    assert done.record["evaluations"][-1]["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_a_checkpoint_is_trained_further(tmp_path: Path) -> None:
    """It keeps its dtype and its tokenizer; a masked model learns from hidden tokens."""
    for family in ("gpt2", "bert"):
        folder = tiny_folder(tmp_path / family, family, dtype=torch.bfloat16)
        spec = small(
            tmp_path, model=str(folder), tokenizer=None, accumulate=2, learning_rate=1e-2, pack=family == "gpt2"
        )
        done = train(spec, tmp_path / f"{family}-out")
        assert done.record["objective"] == ("causal" if family == "gpt2" else "masked")
        assert done.record["losses"][-1] < done.record["losses"][0]
        after = taut.load(tmp_path / f"{family}-out")
        assert after.dtype == torch.bfloat16
        assert (tmp_path / f"{family}-out" / "chat_template.jinja").is_file()


def test_pieces_of_a_step_add_up(tmp_path: Path) -> None:
    """Rows of different lengths weigh by their targets, however a step is cut into pieces."""
    text = tmp_path / "lines.txt"
    text.write_text("\n\n".join("word " * (n % 5 + 1) + str(n) for n in range(100)))
    spec = {"text": str(text), "pack": False, "budget": {"steps": 3}, "clip": 0.0}
    whole = train(SMALL | spec, tmp_path / "a").record["losses"]
    pieces = train(SMALL | spec | {"accumulate": 4}, tmp_path / "b").record["losses"]
    assert pieces == pytest.approx(whole, abs=1e-6)


def test_seconds_end_a_run(tmp_path: Path) -> None:
    done = train(small(tmp_path, budget={"seconds": 0.3}, evaluate={"every": 0.5, "tokens": 200}), tmp_path / "out")
    spent = done.record["spent"]
    assert done.status == "done"
    assert spent["seconds"] >= 0.3
    assert spent["steps"] == len(done.record["losses"]) > 1
    assert len(done.record["evaluations"]) == 2
    assert done.record["planned_steps"] is None
    # Time spent before a cut counts.
    with pytest.raises(Cut):
        train(small(tmp_path, budget={"seconds": 0.3}, save={"seconds": 0}), tmp_path / "cut", progress=cut_at(5))
    before = json.loads((newest(tmp_path / "cut.state") / "spent.json").read_text())["seconds"]
    again = train(small(tmp_path, budget={"seconds": 0.3}, save={"seconds": 0}), tmp_path / "cut").record
    assert len(again["losses"]) > 5
    assert 0.3 <= again["spent"]["seconds"] < 0.3 + before + 1


def test_a_run_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    spec = small(
        tmp_path, recipe=LOW_RANK, guide={"share": 0.75}, save={"seconds": 0}, model=LLAMA + ",attention_dropout=0.1"
    )
    whole = train(spec, tmp_path / "whole")
    for step in (3, 5):
        with pytest.raises(Cut):
            train(spec, tmp_path / "out", progress=cut_at(step))
        assert newest(tmp_path / "out.state").name == f"checkpoint-{step - 1}"
    # A checkpoint that was cut off while it was written is not used. A whole one opens as a model, without its guides.
    broken = tmp_path / "out.state" / "checkpoint-7"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_')
    assert taut.load(newest(tmp_path / "out.state"))
    with pytest.raises(TautError, match=r"another training run: learning_rate was 0.001, now 0.1; remove it"):
        train(spec | {"learning_rate": 0.1}, tmp_path / "out")
    run = tmp_path / "out.state" / "run.json"
    current = run.read_text()
    run.write_text(json.dumps({key: value for key, value in json.loads(current).items() if key != "version"}))
    with pytest.raises(TautError, match="another version of taut; remove it"):
        train(spec, tmp_path / "out")
    run.write_text(current)
    done = train(spec, tmp_path / "out")
    assert done.record["losses"] == whole.record["losses"]
    assert done.record["evaluations"] == whole.record["evaluations"]
    assert done.record["guide"] == whole.record["guide"]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert not (tmp_path / "out.state").exists()


def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    spec = small(tmp_path, save={"seconds": 0}, budget={"steps": 400})
    command = [sys.executable, str(Path(__file__).with_name("runs.py")), json.dumps(spec), str(tmp_path / "out")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    steps = 0
    for line in child.stdout:
        steps = int(line)
        if steps >= 5:
            os.kill(child.pid, signal.SIGKILL)
            break
    child.wait()
    at = int(newest(tmp_path / "out.state").name.rpartition("-")[2])
    assert 4 <= at < 400
    # The same command would run all 400 steps; this one stops where enough is known.
    with pytest.raises(Cut):
        train(spec, tmp_path / "out", progress=cut_at(at + 5))
    seen = json.loads((newest(tmp_path / "out.state") / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in seen if "loss" in entry]
    assert len(losses) == at + 4
    unbroken: list[float] = []

    def listen(moment) -> None:
        if not moment.evaluation:
            unbroken.append(moment.loss)
        if len(unbroken) == len(losses):
            raise Cut

    with pytest.raises(Cut):
        train(spec | {"save": {"seconds": 1000}}, tmp_path / "other", progress=listen)
    assert losses == unbroken


def test_a_run_that_learned_nothing_binds_nobody(tmp_path: Path) -> None:
    lost = train(small(tmp_path, learning_rate=1e9), tmp_path / "out")
    assert (lost.status, newest(tmp_path / "out.state")) == ("failed", None)
    assert train(small(tmp_path), tmp_path / "out").status == "done"


def test_a_loss_that_runs_away_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, total, steps = LanguageModelling.begin, LanguageModelling.total, []

    def spoiled(task: LanguageModelling, *tensors: Tensor, **named: Tensor) -> Tensor:
        return total(task, *tensors, **named) * (math.nan if task.training and steps[-1] == 5 else 1.0)

    monkeypatch.setattr(LanguageModelling, "begin", lambda task, step: (steps.append(step), begin(task, step)))
    monkeypatch.setattr(LanguageModelling, "total", spoiled)
    spec = small(tmp_path, save={"seconds": 0})
    done = train(spec, tmp_path / "out")
    assert (done.status, done.exit_code) == ("failed", 1)
    assert "the loss is nan at step 6" in done.record["reason"]
    assert json.loads((tmp_path / "out.state" / "training.json").read_text())["reason"] == done.record["reason"]
    good = newest(tmp_path / "out.state")
    assert good.name == "checkpoint-5"
    assert all(torch.isfinite(tensor).all() for tensor in taut.load(good).state_dict().values())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("writer", ["save_pretrained", "torch.save"])
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str) -> None:
    from transformers import PreTrainedModel

    spec, calls = small(tmp_path, save={"steps": 2}), []
    owner, name = (PreTrainedModel, "save_pretrained") if writer == "save_pretrained" else (torch, "save")
    write = getattr(owner, name)

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) > (2 if writer == "save_pretrained" else 7):
            raise OSError(28, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(TautError, match=r"the disk is full; the checkpoint of step 4 is whole: free some space"):
        train(spec, tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out.state").glob("checkpoint-*")] == ["checkpoint-4"]
    assert train(spec, tmp_path / "out").record["losses"] == train(spec, tmp_path / "again").record["losses"]


def test_ctrl_c_stops_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = small(tmp_path)

    def press(moment) -> None:
        if moment.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    done = train(spec, tmp_path / "out", progress=press)
    assert (done.status, done.exit_code) == ("interrupted", 130)
    assert "the same command goes on" in done.sentence()
    assert "ctrl-C once more" in caplog.text
    assert newest(tmp_path / "out.state").name in ("checkpoint-3", "checkpoint-4")
    assert train(spec, tmp_path / "out").record["losses"] == train(spec, tmp_path / "whole").record["losses"]
    stop = Stop()
    with stop.listening(lambda text: None):
        os.kill(os.getpid(), signal.SIGINT)
        # The same signal, passed on by a launcher.
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(TWICE)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.asked


def test_the_command_line_trains(tmp_path: Path) -> None:
    spec = tmp_path / "first.yaml"
    (tmp_path / "tiny.txt").write_text(TEXT)
    (tmp_path / "thin.yaml").write_text("feedforward: {method: low_rank, keep: 0.5}\n")
    spec.write_text(
        f"model: {LLAMA}\nrecipe: thin.yaml\ntext: {tmp_path}/tiny.txt\ntokenizer: bytes\nlength: 16\nbatch: 4\n"
        "learning_rate: 1e-3\nbudget: {tokens: 5e2}\n"
    )
    words = ["train", str(spec), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--json"], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads((tmp_path / "out" / "training.json").read_text())["spent"]["steps"] == 7
    assert "7 steps, 448 tokens" in CliRunner().invoke(app, words, catch_exceptions=False).output


def test_the_shipped_spec_is_valid() -> None:
    spec = TrainSpec.load(Path(__file__).parent.parent / "studies" / "train_small.yaml")
    assert spec.budget.tokens == 300_000
    assert spec.guide is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": {"tokns": 3}}, r"train: budget: unknown key 'tokns': did you mean 'tokens'\?"),
        ({"budget": {"tokens": 9, "steps": 3}}, "exactly one of steps, tokens, flops, seconds, not steps and tokens"),
        ({"budget": {}}, "not none"),
        ({"lenght": 3}, "unknown key 'lenght': did you mean 'length'"),
        ({"length": 2}, "length = 2: Input should be greater"),
        ({"precision": "flot32"}, "precision = 'flot32': did you mean 'float32'"),
        ({"schedule": "cosin"}, "schedule = 'cosin'"),
        ({"batch": 5, "accumulate": 2}, "batch = 5 is not a multiple of accumulate = 2"),
        ({"recipe": {"feedforwrd": {}}}, "train: recipe: unknown slot 'feedforwrd'"),
        ({"guide": {}}, "there is no recipe"),
        ({"guide": {"share": 1.5}, "recipe": LOW_RANK}, "guide.share = 1.5: a share is at most 1"),
        ({"guide": {}, "recipe": LOW_RANK, "budget": {"seconds": 3}}, "its schedule counts steps"),
        ({"model": "t5:num_layers=1"}, "an encoder-decoder"),
        ({"model": LLAMA, "objective": "masked"}, "is causal"),
        ({"model": "bert:hidden_size=32,num_attention_heads=4", "objective": "causal"}, "attends to later tokens"),
        ({"length": 65}, "length = 65: .* has 64 positions"),
        ({"model": LLAMA + ",vocab_size=100"}, "a vocabulary of 100, but the tokenizer has 260"),
        ({"model": "minilm"}, "has no head over its vocabulary, so there is nothing to predict"),
        ({"report_to": "trackio"}, "not installed: pip install trackio"),
        ({"precision": "float16"}, "needs a GPU"),
        ({"text": "nowhere"}, "no such name, file or folder"),
        (
            {"text": "tiny.txt", "length": 64, "batch": 4000},
            "64 tokens to train on, but at least 4000 are needed",
        ),
        ({"recipe": {"projection": {"method": "low_bit", "bits": 8}}, "guide": {}}, "a guide cannot train it"),
        ({"recipe": {"embedding": {"method": "low_rank", "rank": 8}}, "guide": {}}, "puts no linear part into"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TautError, match=message) as caught:
        train({**small(tmp_path), **change}, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_learn_what_one_does(tmp_path: Path, launcher: str) -> None:
    spec = tmp_path / "spec.yaml"
    (tmp_path / "tiny.txt").write_text(TEXT)
    content = {"recipe": LOW_RANK, "guide": {"stochastic": False}, "save": {"steps": 3}}
    spec.write_text(json.dumps(small(tmp_path, **content)))
    module = [sys.executable, "-m"]
    start = {
        "torchrun": [*module, "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617", "-m", "taut"],
        "accelerate": [
            *(*module, "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29618", "-m", "taut"),
        ],
    }[launcher]
    command = [*start, "train", str(spec), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "training.json").read_text())
    one = train(spec, tmp_path / "one").record
    assert two["processes"] == 2
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert [entry["loss"] for entry in two["evaluations"]] == pytest.approx(
        [entry["loss"] for entry in one["evaluations"]], abs=1e-5
    )
    # Each process passes its guides on its own, with half of the rows.
    assert two["guide"]["flops_used"] == one["guide"]["flops_used"]
    assert two["guide"]["calls"] == 2 * one["guide"]["calls"]
