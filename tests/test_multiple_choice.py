"""Multiple choice through lm-evaluation-harness: by hand, against the harness's own run, and on real questions."""

import copy
import json
import logging
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from tiny_tokenizer import SIZE, tiny_tokenizer
from transformers import PreTrainedModel

import taut
from taut import data
from taut.contract.tiny import tiny
from taut.core.errors import TautError
from taut.evaluation.tasks.multiple_choice import MultipleChoice, shortcuts, wilson

harness = pytest.importorskip("lm_eval")
WINDOW = {"method": "window_sink", "sinks": 1, "window": 6}
ANCHOR = {"method": "anchor", "every": 5}
CHOSEN = {"method": "key_norm", "entries": 8, "recent": 4}


def model(memory: dict | None = None, family: str = "llama", **overrides: object) -> PreTrainedModel:
    subject = tiny(family, vocab_size=SIZE, dtype=torch.float64, max_position_embeddings=512, **overrides)
    return taut.apply(subject, {"memory": memory}) if memory else subject


def questions_file(folder: Path, count: int = 40) -> str:
    """Questions of two to four choices, made of the words of a text that every Python has."""
    words = sorted({word for word in data.text("python_topics", limit=20_000).rows[0][0].split() if word.isalpha()})
    items = [
        {
            "question": f"What comes after {words[3 * number]} and {words[3 * number + 1]}?",
            "choices": [" ".join(words[7 * number + place :][: 1 + place]) for place in range(2 + number % 3)],
            "answer": number % 2,
        }
        for number in range(count)
    ]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(item) for item in items))
    return str(path)


def samples(task: MultipleChoice, subject: PreTrainedModel, seed: int = 0) -> dict[str, tuple[float, ...]]:
    scores = task.evaluate(subject, tiny_tokenizer(), seed=seed)
    return {score.metric: score.quantity.samples for score in scores}


# Scores


@pytest.mark.parametrize("memory", [None, WINDOW, ANCHOR], ids=["full", "window", "anchor"])
def test_accuracy_by_hand(memory: dict | None, tmp_path: Path):
    subject, tokenizer = model(memory), tiny_tokenizer()
    task = MultipleChoice.parse({"data": questions_file(tmp_path), "limit": 20, "batch_size": 3})
    expected: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for _, question, right, *choices in task.evaluated().rows:
        likely = []
        before = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        for choice in choices:
            ids = tokenizer(f"Question: {question}\nAnswer: {choice}")["input_ids"]
            assert ids[: len(before)] == before
            with torch.no_grad():
                logs = subject(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            likely.append(sum(float(logs[at - 1, ids[at]]) for at in range(len(before), len(ids))))
        normed = [value / len(choice) for value, choice in zip(likely, choices, strict=True)]
        expected["acc"].append(float(likely.index(max(likely)) == int(right)))
        expected["acc_norm"].append(float(normed.index(max(normed)) == int(right)))
    result = samples(task, subject)
    assert {name: list(values) for name, values in result.items()} == expected
    assert 0 < sum(result["acc"]) < 20


@pytest.mark.parametrize("shots", [0, 3])
def test_equal_to_what_the_harness_itself_reports(shots: int, tmp_path: Path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from taut.evaluation._harness import published

    subject = model()
    task = MultipleChoice.parse({"data": questions_file(tmp_path), "limit": 15, "shots": shots})
    scored, examples = task.splits()
    theirs, _ = published("mine", scored.rows, examples.rows, shots, seed=7)
    reader = HFLM(pretrained=subject, tokenizer=tiny_tokenizer(), batch_size=4)
    # Without the index of its own tasks, which takes it ten seconds.
    options = {"task_manager": TaskManager(include_defaults=False), "fewshot_random_seed": 7, "bootstrap_iters": 0}
    result = simple_evaluate(reader, tasks=[theirs], num_fewshot=shots, **options)
    ours = samples(task, subject, seed=7)
    assert set(ours) == {"acc", "acc_norm"}
    for metric, values in ours.items():
        kept = {sample["doc_id"]: sample[metric] for sample in result["samples"]["mine"]}
        assert list(values) == [kept[place] for place in range(15)]
        assert sum(values) / 15 == pytest.approx(result["results"]["mine"][f"{metric},none"])


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batches_do_not_change_the_score(batch_size: int, tmp_path: Path):
    options = {"data": questions_file(tmp_path), "limit": 12, "shots": 1}
    whole = samples(MultipleChoice.parse(options), model())
    assert samples(MultipleChoice.parse(options | {"batch_size": batch_size}), model()) == whole


@pytest.mark.parametrize("memory", [None, WINDOW, ANCHOR], ids=["full", "window", "anchor"])
def test_through_the_cache_or_at_once_is_the_same(memory: dict | None, tmp_path: Path):
    options = {"data": questions_file(tmp_path), "limit": 8, "shots": 1}
    at_once = samples(MultipleChoice.parse(options), model(memory))
    assert samples(MultipleChoice.parse(options | {"cached": 4}), model(memory)) == at_once


def test_a_memory_that_chooses_is_only_asked_through_the_cache(tmp_path: Path):
    options = {"data": questions_file(tmp_path), "limit": 30}
    full = samples(MultipleChoice.parse(options), model())
    assert samples(MultipleChoice.parse(options), model(CHOSEN)) == full
    assert samples(MultipleChoice.parse(options | {"cached": 1}), model(CHOSEN)) != full


def test_the_record_says_what_was_done(tmp_path: Path):
    task = MultipleChoice.parse({"data": questions_file(tmp_path), "limit": 20, "shots": 2})
    seen: list[tuple[int, int]] = []
    acc, normed = task.evaluate(
        model(), tiny_tokenizer(), seed=5, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (20, 20)
    assert (acc.metric, normed.metric) == ("acc", "acc_norm")
    assert acc.data["items"] == "20"
    assert f"lm_eval {harness.__version__}" in acc.quantity.how
    assert "2 worked examples before each question, drawn with seed 5" in acc.quantity.how
    assert 0 <= acc.quantity.low < acc.quantity.value < acc.quantity.high <= 1
    assert set(acc.baselines) == {"chance", "most_frequent_place", "longest_answer"}


def test_shortcuts_and_interval_by_hand():
    rows = [("", "a", "0", "long answer", "short"), ("", "b", "0", "x", "yy", "zzz", "w"), ("", "c", "1", "q", "rr")]
    assert shortcuts(rows) == {
        "chance": (1 / 2 + 1 / 4 + 1 / 2) / 3,
        "most_frequent_place": 2 / 3,
        "longest_answer": 2 / 3,
    }
    # Wilson 1927: (p + z2/2n +- z sqrt(p (1 - p) / n + z2 / 4n2)) / (1 + z2/n), here p = .3, n = 10.
    assert wilson([1.0] * 3 + [0.0] * 7) == pytest.approx((0.10779, 0.60322), abs=1e-4)
    assert wilson([0.0] * 5)[0] == 0


# Examples, lengths, and what is left as it was


@pytest.mark.parametrize("shots", [1, 4])
def test_examples_come_from_rows_that_are_never_scored(shots: int, tmp_path: Path):
    from taut.evaluation._harness import published

    path = questions_file(tmp_path)
    scored, examples = MultipleChoice.parse({"data": path, "limit": 36, "shots": shots}).splits()
    assert len(scored.rows) == 36
    assert not {row[1] for row in scored.rows} & {row[1] for row in examples.rows}
    contexts = {}
    for seed in (0, 0, 1):
        task, _ = published("mine", scored.rows, examples.rows, shots, seed)
        drawn = [task.fewshot_context(doc=doc, num_fewshot=shots) for _, doc in task.doc_iterator()]
        assert contexts.setdefault(seed, drawn) == drawn
    assert contexts[0] != contexts[1]
    answered = {f"Question: {row[1]}\nAnswer: {row[3 + int(row[2])]}" for row in examples.rows}
    for row, context in zip(scored.rows, contexts[0], strict=True):
        *before, last = context.split("\n\n")
        assert len(set(before)) == shots
        assert set(before) <= answered
        assert last == f"Question: {row[1]}\nAnswer:"
    fewer = MultipleChoice.parse({"data": path, "limit": 5}).splits()[1]
    assert fewer == examples


def test_long_prompts_lose_their_beginning_and_long_answers_are_told(tmp_path: Path):
    path, subject = questions_file(tmp_path), model()
    task = MultipleChoice.parse({"data": path, "limit": 20, "max_length": 30})
    score = task.evaluate(subject, tiny_tokenizer())[0]
    long = sum(
        max(len(tiny_tokenizer()(f"Question: {row[1]}\nAnswer: {choice}")["input_ids"]) for choice in row[3:]) > 31
        for row in task.evaluated().rows
    )
    assert long > 0
    assert f"{long} prompts cut at their beginning" in score.quantity.how
    few = MultipleChoice.parse({"data": path, "limit": 20, "max_length": 12}).evaluate(subject, tiny_tokenizer())[0]
    assert 0 < len(few.quantity.samples) < 20
    assert f"{20 - len(few.quantity.samples)} questions skipped because of a longer answer" in few.quantity.how
    assert few.data["items"] == str(len(few.quantity.samples))
    with pytest.raises(TautError, match="every question has an answer of more than 2 tokens"):
        MultipleChoice.parse({"data": path, "max_length": 2}).evaluate(subject, tiny_tokenizer())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_model_tokenizer_and_logging_are_left_as_they_were(family: str, tmp_path: Path):
    """Also a compressed one, whose tied table the harness would tie again."""
    subject = taut.apply(
        tiny(family, vocab_size=SIZE), {"embedding": {"method": "low_bit"}, "feedforward": {"method": "low_bit"}}
    ).train()
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    before = copy.deepcopy(subject.state_dict())
    level = logging.getLogger("lm_eval").level
    task = MultipleChoice.parse({"data": questions_file(tmp_path, 12)})
    first = task.evaluate(subject, tokenizer)
    assert task.evaluate(subject, tokenizer) == first
    assert subject.training
    assert tokenizer.pad_token is None
    assert logging.getLogger("lm_eval").level == level
    after = subject.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_without_the_harness_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    harness = {"taut.evaluation._harness"} | {name for name in sys.modules if name.partition(".")[0] == "lm_eval"}
    for name in harness & set(sys.modules):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(TautError, match=r"task multiple_choice: needs lm_eval \(.*\): pip install 'taut\[eval\]'"):
        MultipleChoice.parse({"data": questions_file(tmp_path)}).evaluate(model(), tiny_tokenizer())


# Wrong input


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"question": "a", "choices": ["b", "c"]}', "questions.json: question 1: KeyError: 'answer'"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "question 1: answer 2 of 2 choices"),
        ('{"question": "a", "choices": ["b", " "], "answer": 0}', "question 1: answer 0 of 2 choices"),
        ('{"question": "a", "choices": ["b"], "answer": "right"}', "question 1: ValueError"),
        ('["a"]', "question 1: "),
        ("a question", "questions.json: expected JSON objects"),
        ("", "has 0 questions"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 1}', "has 1 questions, 1 of them kept for examples"),
    ],
)
def test_wrong_files_are_told(content: str, words: str, tmp_path: Path):
    (tmp_path / "questions.json").write_text(content)
    with pytest.raises(TautError, match=words):
        MultipleChoice.parse({"data": str(tmp_path / "questions.json")}).evaluated()


def test_wrong_choices_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(TautError, match="40 questions, 4 of them kept for examples; expected .* 5 for shots = 5"):
        MultipleChoice.parse({"data": questions_file(tmp_path), "shots": 5}).evaluated()
    with pytest.raises(TautError, match="did you mean 'openbookqa'"):
        MultipleChoice.parse({"data": "openbokqa"}).evaluated()
    with pytest.raises(TautError, match="questions come from a file or a name"):
        MultipleChoice.parse({"data": "hub:allenai/openbookqa:test:a,b"}).evaluated()
    with pytest.raises(TautError, match="data piqa: unknown split 'train'"):
        MultipleChoice.parse({"data": "piqa", "split": "train"}).evaluated()
    monkeypatch.delenv("TAUT_DATA", raising=False)
    with pytest.raises(TautError, match="qa/piqa/valid.jsonl is needed, but TAUT_DATA is not set"):
        MultipleChoice.parse({"data": "piqa"}).evaluated()
    assert "does not predict the next token" in MultipleChoice().fits(tiny("bert"))
    assert "sequence to sequence" in MultipleChoice().fits(tiny("t5"))


# Real questions


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is looked up and no connection is made."""

    def refuse(*arguments: object, **more: object) -> None:
        raise AssertionError(f"the network was asked for: {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


needs_data = pytest.mark.skipif(
    not (os.environ.get("TAUT_DATA") and (Path(os.environ["TAUT_DATA"]) / "qa").is_dir()),
    reason="needs qa in TAUT_DATA",
)


@needs_data
@pytest.mark.parametrize(
    ("name", "least", "choices"),
    [
        ("openbookqa", 4900, {4}),
        ("arc_easy", 2200, {3, 4, 5}),
        ("arc_challenge", 1100, {3, 4, 5}),
        ("piqa", 1225, {2}),
        ("boolq", 1600, {2}),
    ],
)
def test_published_sets_are_read_whole(name: str, least: int, choices: set[int]):
    rows = data.questions(name).rows
    assert len(rows) >= least
    assert len(set(rows)) == len(rows)
    assert {len(row) - 3 for row in rows} == choices
    assert {int(row[2]) for row in rows} >= set(range(min(choices)))
    assert not any("Answer2: " in cell or "Answer format" in cell for row in rows for cell in row)
    assert all(row[0] for row in rows) == (name == "boolq")


PROMPTS = {
    "openbookqa": "{1}",
    "arc_easy": "Question: {1}\nAnswer:",
    "arc_challenge": "Question: {1}\nAnswer:",
    "piqa": "Question: {1}\nAnswer:",
    "boolq": "{0}\nQuestion: {1}?\nAnswer:",
}


@needs_data
@pytest.mark.parametrize("name", PROMPTS)
def test_published_prompts_on_a_real_model(name: str, offline: None):
    from taut.evaluation._harness import published

    rows = data.questions(name).rows[:5]
    task, _ = published(name, rows, rows, 0, seed=0)
    for row, (place, document) in zip(rows, task.doc_iterator(), strict=True):
        context = task.fewshot_context(doc=document, num_fewshot=0)
        assert context == PROMPTS[name].format(*row)
        requests = task.construct_requests(document, context, metadata=(name, place, 1))
        assert [request.args for request in requests] == [(context, f" {choice}") for choice in row[3:]]
        assert task.doc_to_target(document) == int(row[2])
    folder = Path(os.environ["TAUT_DATA"]).parent / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("needs models/stories260K beside TAUT_DATA")
    scores = taut.evaluate(folder, "multiple_choice", data=name, limit=8, shots=1)
    assert [score.metric for score in scores] == (["acc"] if name == "boolq" else ["acc", "acc_norm"])
    assert scores[0].baselines["chance"] == pytest.approx(0.5 if name in ("piqa", "boolq") else 0.25, abs=0.04)
