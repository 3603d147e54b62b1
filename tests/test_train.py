"""taut train: specs, text, budgets, going on where a run was cut off, and what the folder says."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from runs import LLAMA, LOW_RANK, SMALL, TEXT, small
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import taut
from taut import data
from taut.cli import app
from taut.contract.tiny import inputs, tiny
from taut.core.errors import TautError
from taut.measurement.count import flops_per_token
from taut.training.budget import Costs, costs_of, plan_course
from taut.training.corpus import read_corpus
from taut.training.flops import Decoder, block_dense_map, block_shuffle_map, dense_map, low_rank_map, matched_share
from taut.training.loop import Stop
from taut.training.rows import Masking, Rows, Stream, spread, token_rows
from taut.training.run import train
from taut.training.schedule import course, rate
from taut.training.spec import TrainSpec
from taut.training.task import IGNORED, LanguageModelling
from taut.training.tokenizer import LEAST, byte_level, make_tokenizer
from taut.training.trainer import newest

SIZES = {
    "s": Decoder(768, 3072, 12, 12),
    "m": Decoder(1024, 4096, 24, 16),
    "l": Decoder(1536, 6144, 24, 12),
    "xl": Decoder(2048, 8192, 24, 16),
}


class Cut(BaseException):
    """As abrupt as a kill."""


def cut_at(step: int):
    def tell(moment) -> None:
        if moment.step == step and not moment.evaluation:
            raise Cut

    return tell


def weights(folder: Path) -> dict[str, Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# The published table: size and feed-forward weights in millions, training FLOPs for 25.5 billion tokens.
@pytest.mark.parametrize(
    ("numbers", "size", "feedforward", "flops"),
    [
        (dense_map, 1274, 805, "2.10e+20"),
        (low_rank_map(1024), 985, 516, "1.66e+20"),
        (block_dense_map(4, 1536), 955, 486, "1.61e+20"),
        (block_shuffle_map(2), 985, 516, "1.66e+20"),
        (low_rank_map(512), 744, 275, "1.29e+20"),
        (block_dense_map(4, 768), 728, 260, "1.27e+20"),
        (block_shuffle_map(4), 744, 275, "1.29e+20"),
    ],
)
def test_the_published_sizes_and_flops(numbers, size: int, feedforward: int, flops: str) -> None:
    decoder = SIZES["xl"]
    assert round(decoder.parameters(numbers) / 1e6) == size
    assert round(decoder.feedforward(numbers) / 1e6) == feedforward
    assert f"{decoder.training_flops(25.5e9, numbers):.2e}" == flops


@pytest.mark.parametrize(
    ("name", "numbers", "share"),
    [
        ("s", low_rank_map(192), 0.30),
        ("m", low_rank_map(256), 0.38),
        ("l", low_rank_map(384), 0.41),
        ("xl", low_rank_map(512), 0.43),
        ("m", block_dense_map(4, 384), 0.40),
        ("xl", block_dense_map(4, 768), 0.45),
    ],
)
def test_the_published_guided_shares(name: str, numbers, share: float) -> None:
    decoder = SIZES[name]
    found = decoder.guided_share(numbers)
    assert round(found, 2) == share
    guided = decoder.training_flops(1 + found, numbers) + found * decoder.guide_flops(1) / 2
    assert guided == pytest.approx(decoder.training_flops(1), rel=1e-12)


def test_the_published_wide_models() -> None:
    """Grouped queries: sizes of both, and 0.395 of the larger one's guided share."""
    medium = Decoder(1024, 4864, 24, 8, attention=512, key_heads=4)
    large = Decoder(1536, 7424, 24, 12, attention=768, key_heads=4)
    assert round(medium.parameters(low_rank_map(512)) / 1e6) == 219
    assert round(large.parameters(low_rank_map(768)) / 1e6) == 464
    assert round(Decoder(1024, 4864, 24, 16, key_heads=4).parameters() / 1e6) == 335
    assert round(Decoder(1536, 7424, 24, 12, key_heads=2).parameters() / 1e6) == 729
    numbers = low_rank_map(768)
    dense, ours = SIZES["l"].training_flops(1), large.training_flops(1, numbers)
    assert matched_share(dense, ours, large.guide_flops(1)) == pytest.approx(0.395, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "llama_untied", "qwen3"])
def test_flops_of_any_model_are_what_torch_counts(family: str) -> None:
    model = tiny(family)
    counted = 3 * flops_per_token(model, inputs(model, 2, 12)).value
    assert costs_of(model, 12).model == counted == costs_of(model, 12).dense
    taut.apply(model, {"feedforward": {"method": "low_rank", "keep": 0.5}})
    thin = costs_of(model, 12)
    assert thin.model == 3 * flops_per_token(model, inputs(model, 2, 12)).value < counted == thin.dense


def test_budgets_buy_whole_steps() -> None:
    costs = Costs(model=100.0, dense=150.0, guides=60.0)

    def total(budget: dict, guide: dict | None = None, **more) -> tuple[int, int]:
        spec = TrainSpec.load(
            SMALL | {"length": 10, "batch": 2, "budget": budget, "guide": guide, "recipe": LOW_RANK} | more
        )
        found = plan_course(spec, costs)
        return found.total, found.guided

    assert total({"steps": 7}) == (7, 0)
    assert total({"tokens": 79}) == (3, 0)
    assert total({"flops": 7999}) == (3, 0)
    assert total({"steps": 100}, {}) == (100, 50)
    assert total({"steps": 100}, {"share": 0.29}) == (100, 29)
    # (150 - 100) / (100 + 60 / 2), and twice as dear where every guide is computed.
    assert total({"steps": 130}, {"mode": "matched_flops"}) == (180, 50)
    assert total({"steps": 160}, {"mode": "matched_flops", "stochastic": False}) == (210, 50)
    # All FLOPs count: 20 x (100 + 0.5 x 30) a step.
    assert total({"flops": 23_000}, {}) == (10, 5)
    with pytest.raises(TautError, match="less than one step, which takes 20 tokens"):
        total({"tokens": 19})
    with pytest.raises(TautError, match="guides no step"):
        total({"steps": 3}, {"share": 0.1})
    with pytest.raises(TautError, match="outlast the training"):
        plan_course(
            TrainSpec.load(SMALL | {"guide": {"mode": "matched_flops"}, "recipe": LOW_RANK}), Costs(10.0, 100.0, 90.0)
        )


def test_rates_rise_and_fall() -> None:
    rates = [rate(step / 10, 0.1, 0.2, "cosine", 0.1) for step in range(11)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.55)
    assert rates[10] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rate(0.6, 0.1, 0.2, "linear", 0.0) == pytest.approx(0.5)
    assert rate(1.7, 0.1, 0.0, "linear", 0.0) == 0.0
    assert rate(0.9, 0.1, 0.0, "constant", 0.0) == 1.0


def test_repeated_batches_come_at_the_end() -> None:
    whole = course(10, 0.4, "matched_flops")
    assert [whole.batch_of(step) for step in range(whole.total)] == [*range(10), *range(4)]


def test_every_epoch_has_all_rows_once() -> None:
    rows = Rows(torch.arange(60, dtype=torch.int32).reshape(6, 10))
    stream = Stream(rows, 12, 2, seed=3)
    epochs = [[int(stream[position]["input_ids"][0]) // 10 for position in range(start, start + 6)] for start in (0, 6)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]
    item = stream[0]
    assert torch.equal(item["labels"][:-1], item["input_ids"][1:])
    assert item["labels"][-1] == IGNORED
    repeated = Stream(rows, 12, 2, 3, batch_of=lambda step: step % 2)
    assert torch.equal(repeated[0]["input_ids"], repeated[4]["input_ids"])


def test_held_out_text_is_not_learned_from(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    first = TEXT.split("\n\n")[0]
    (tmp_path / "b.txt").write_text("\n".join([*(f"Line {n} is long enough." for n in range(40)), first]))
    spec = TrainSpec.load(SMALL | {"text": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]})
    corpus = read_corpus(spec)
    held = [line for text in corpus.held for line in text.split("\n") if line]
    learned = [line for text in corpus.learned for line in text.split("\n") if line]
    assert len(held) == 10 + 2
    assert held[-1] == first
    # The same sentence at the start of the first file is taken out there.
    assert first not in learned
    assert len(learned) == 190 - 1 + 39
    assert set(held).isdisjoint(learned)
    other = read_corpus(TrainSpec.load(SMALL | {"text": str(tmp_path / "a.txt"), "evaluate": {"text": spec.text[1]}}))
    assert first not in other.learned[0].split("\n\n")
    assert len(other.learned[0].split("\n\n")) == 199


def test_rows_packed_and_padded() -> None:
    tokenizer = byte_level(LEAST, ())
    spec = TrainSpec.load(SMALL)
    packed = token_rows(["abc" * 9, "de"], tokenizer, spec, False)
    stream = "abc" * 9 + "</s>" + "de" + "</s>"
    assert packed.ids.shape == (1, 16)
    assert stream.startswith(tokenizer.decode(packed.ids[0]))
    padded = token_rows(["abc\n" + "defgh" * 9], tokenizer, TrainSpec.load(SMALL | {"pack": False}), False)
    assert padded.real.sum(1).tolist() == [4, 16]
    assert padded.tokens == 20
    item = Stream(padded, 2, 2, 0)[0]
    assert set(item) == {"input_ids", "labels", "attention_mask"}
    assert int((item["labels"] != IGNORED).sum()) == int(item["attention_mask"].sum()) - 1
    assert Stream(padded, 4, 2, 0).tokens(2) == 40
    assert len(spread(packed, 1)) == 1


def test_masked_rows_hide_the_same_number_of_tokens() -> None:
    tokenizer = byte_level(LEAST, (), framed=True)
    rows = token_rows(["a text that is long enough " * 20], tokenizer, TrainSpec.load(SMALL), True)
    stream = Stream(rows, 40, 4, 0, Masking(0.25, tokenizer.mask_token_id, len(tokenizer)))
    shown = []
    for position in range(40):
        item = stream[position]
        asked = item["labels"] != IGNORED
        assert int(asked.sum()) == 3
        assert item["input_ids"][0] == tokenizer.cls_token_id
        assert item["input_ids"][-1] == tokenizer.sep_token_id
        shown += item["input_ids"][asked].tolist()
    assert shown.count(tokenizer.mask_token_id) / len(shown) == pytest.approx(0.8, abs=0.12)
    assert torch.equal(stream[7]["input_ids"], stream[7]["input_ids"])


def test_tokenizers_are_made_once(tmp_path: Path) -> None:
    from taut.surgery.source import resolve

    source = resolve(LLAMA)
    texts = [TEXT]
    made = make_tokenizer("bpe:300", source, texts, False, tmp_path / "t")
    assert len(made) == 300
    assert made.decode(made("Zoë, 3 lines")["input_ids"]) == "Zoë, 3 lines"
    assert len(make_tokenizer("bpe:300", source, (), False, tmp_path / "t")) == 300
    assert len(make_tokenizer(str(tmp_path / "t"), source, (), False, tmp_path / "none")) == 300
    for choice, message in ((None, "no tokenizer there"), ("bpe:20", "at least 260"), ("bpe:x", "at least 260")):
        with pytest.raises(TautError, match=message):
            make_tokenizer(choice, source, texts, False, tmp_path / "none")


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
    with pytest.raises(TautError, match=r"another spec gave: save.steps was 3, now None"):
        taut.train(small(tmp_path, recipe=LOW_RANK), tmp_path / "out")


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
    """In its own dtype and with its own tokenizer; a masked model learns from hidden tokens."""
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


def test_a_run_cut_off_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    spec = small(
        tmp_path, recipe=LOW_RANK, guide={"share": 0.75}, save={"seconds": 0}, model=LLAMA + ",attention_dropout=0.1"
    )
    whole = train(spec, tmp_path / "whole")
    for step in (3, 5):
        with pytest.raises(Cut):
            train(spec, tmp_path / "out", progress=cut_at(step))
        assert newest(tmp_path / "out.state").name == f"checkpoint-{step - 1}"
    # One that was cut off while it was written is not used, and a checkpoint is a model that opens without its guides.
    broken = tmp_path / "out.state" / "checkpoint-7"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"global_')
    assert taut.load(newest(tmp_path / "out.state"))
    with pytest.raises(TautError, match=r"another training run: learning_rate was 0.001, now 0.1; remove it"):
        train(spec | {"learning_rate": 0.1}, tmp_path / "out")
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


def test_a_loss_that_runs_away_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin, total, steps = LanguageModelling.begin, LanguageModelling.total, []

    def spoiled(task: LanguageModelling, *given: Tensor, **named: Tensor) -> Tensor:
        return total(task, *given, **named) * (math.nan if task.training and steps[-1] == 5 else 1.0)

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

    def full(*given, **options):
        calls.append(1)
        if len(calls) > (2 if writer == "save_pretrained" else 7):
            raise OSError(28, "No space left on device")
        return write(*given, **options)

    monkeypatch.setattr(owner, name, full)
    with pytest.raises(TautError, match=r"the disk is full; the checkpoint of step 4 is whole: free some space"):
        train(spec, tmp_path / "out")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "out.state").glob("checkpoint-*")] == ["checkpoint-4"]
    assert train(spec, tmp_path / "out").record["losses"] == train(spec, tmp_path / "again").record["losses"]


def test_ctrl_c_stops_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    spec = small(tmp_path)

    def press(moment) -> None:
        if moment.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    done = train(spec, tmp_path / "out", progress=press)
    assert (done.status, done.exit_code) == ("interrupted", 130)
    assert "the same command goes on" in done.sentence()
    assert "ctrl-C once more" in capsys.readouterr().err
    assert newest(tmp_path / "out.state").name in ("checkpoint-3", "checkpoint-4")
    assert train(spec, tmp_path / "out").record["losses"] == train(spec, tmp_path / "whole").record["losses"]
    with Stop().heard(lambda text: None):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


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
        ({"schedule": "cosin"}, "schedule = 'cosin'"),
        ({"batch": 5, "accumulate": 2}, "batch = 5 is no multiple of accumulate = 2"),
        ({"recipe": {"feedforwrd": {}}}, "recipe: recipe: unknown slot 'feedforwrd'"),
        ({"guide": {}}, "there is no recipe"),
        ({"guide": {"share": 1.5}, "recipe": LOW_RANK}, "the guide would outlast the training; at most 1"),
        ({"guide": {}, "recipe": LOW_RANK, "budget": {"seconds": 3}}, "its schedule counts steps"),
        ({"model": "t5:num_layers=1"}, "an encoder-decoder"),
        ({"model": LLAMA, "objective": "masked"}, "is causal"),
        ({"model": "bert:hidden_size=32,num_attention_heads=4", "objective": "causal"}, "sees what comes after"),
        ({"length": 65}, "length = 65: .* has 64 positions"),
        ({"model": LLAMA + ",vocab_size=100"}, "a vocabulary of 100, but the tokenizer has 260"),
        ({"model": "minilm"}, "has no head over its vocabulary: nothing to predict"),
        ({"report_to": "trackio"}, "not installed: pip install trackio"),
        ({"precision": "float16"}, "needs a GPU"),
        ({"text": "nowhere"}, "no such name, file or folder"),
        ({"text": "tiny.txt", "length": 64, "batch": 4000}, "rows of 64 tokens to learn from, and 4000 is the least"),
        ({"recipe": {"projection": {"method": "low_bit", "bits": 8}}, "guide": {}}, "a guide has nobody to teach"),
        ({"recipe": {"embedding": {"method": "low_rank", "rank": 8}}, "guide": {}}, "puts no linear part into"),
    ],
)
def test_wrong_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TautError, match=message) as caught:
        train({**small(tmp_path), **change}, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_documents_keep_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n  Two.\n\nThree.")
    assert data.documents(str(tmp_path / "a.txt")).rows == (("One.\n  Two.\n\nThree.",),)
    assert len(data.documents("builtin").rows) == 1


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
