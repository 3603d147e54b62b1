"""Perplexity and agreement: against the model called token by token, and against itself."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_tokenizer import SIZE, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import taut
from taut import data
from taut.contract.tiny import tiny
from taut.core.errors import TautError
from taut.core.record import Score
from taut.evaluation._language import causal_windows, masked_windows, same_length_batches, tokenize
from taut.evaluation.tasks import agreement, key_value_recall, loss_by_position, perplexity

TEXT = "The statement is executed once. An exception is raised if no handler is found; naïve code fails.\n" * 4


def model(family: str, **overrides: object) -> PreTrainedModel:
    return tiny(family, vocab_size=SIZE, **overrides)


def text_file(folder: Path, content: str = TEXT) -> str:
    path = folder / "text.txt"
    path.write_text(content, encoding="utf-8")
    return str(path)


def values(scores: Sequence[Score]) -> dict[str, float | None]:
    return {score.metric: score.quantity.value for score in scores}


def test_models_that_do_not_fit_are_refused_with_the_reason():
    task = perplexity.Perplexity()
    assert task.fits(model("llama")) is None
    assert task.fits(model("bert")) is None
    assert "LlamaModel has no such head" in task.fits(model("llama", head="base"))
    assert "sequence to sequence" in task.fits(model("t5"))
    with pytest.raises(TautError, match="task perplexity: BertModel has no such head"):
        task.evaluate(model("bert", head="base"), tiny_tokenizer(encoder=True))


# perplexity


@pytest.mark.parametrize("begin", [True, False])
@pytest.mark.parametrize(("length", "stride"), [(8, 1), (8, 3), (8, 7), (8, None), (5, 2), (2, 1), (500, None)])
def test_every_token_is_scored_once(begin: bool, length: int, stride: int | None):
    tokens = tokenize(tiny_tokenizer(), TEXT)
    windows = causal_windows(tokens, 1 if begin else None, length, stride)
    scored = [at for window in windows for at in range(window.first, window.last)]
    assert scored == list(range(0 if begin else 1, len(tokens.ids)))
    assert all(len(window.ids) <= length for window in windows)
    assert len({len(window.ids) for window in windows[:-1]}) <= 1
    assert all(list(window.ids[window.scored]) == tokens.ids[window.first : window.last] for window in windows)
    assert all(window.scored.start >= 1 for window in windows)
    total = sum(tokens.bytes_between(window.first, window.last) for window in windows)
    skipped = 0 if begin else tokens.bytes_between(0, 1)
    assert total == len(TEXT.encode()) - skipped
    batches = list(same_length_batches(windows, 4))
    assert [index for batch in batches for index in batch] == list(range(len(windows)))


@pytest.mark.parametrize("stride", [0, 8, 100])
def test_a_stride_that_leaves_gaps_is_refused(stride: int):
    with pytest.raises(TautError, match=f"stride = {stride} is out of range: 1 to 7"):
        causal_windows(tokenize(tiny_tokenizer(), TEXT), 1, 8, stride)


@pytest.mark.parametrize(("family", "begin"), [("llama", True), ("gpt2", True), ("llama", False)])
@pytest.mark.parametrize(("length", "stride"), [(128, None), (16, 15), (16, 5), (2, 1)])
def test_perplexity_by_hand(family: str, begin: bool, length: int, stride: int | None, tmp_path: Path):
    subject, tokenizer = model(family), tiny_tokenizer(begin=begin)
    content = TEXT[:120]
    options = {"data": text_file(tmp_path, content), "max_length": length, "stride": stride, "batch_size": 3}
    scores = perplexity.Perplexity.parse(options).evaluate(subject, tokenizer)
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    opening = [1] if begin else []
    room = length - len(opening)
    step = stride or room // 2
    total, scored = 0.0, 0
    for at in range(0 if begin else 1, len(ids)):
        # The first window that reaches this token is the one that scores it.
        start = max(0, math.ceil((at - room + 1) / step)) * step
        context = torch.tensor([[*opening, *ids[start:at]]])
        with torch.no_grad():
            total -= float(subject(input_ids=context).logits[0, -1].double().log_softmax(-1)[ids[at]])
        scored += 1
    result = values(scores)
    assert math.log(result["perplexity_per_token"]) == pytest.approx(total / scored, abs=1e-5)
    size = len(content.encode()) - (0 if begin else len(tokenizer.decode(ids[:1]).encode()))
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / size, abs=1e-5)
    for score, expected in zip(scores, (total / scored, total / math.log(2) / size), strict=True):
        assert np.mean(score.quantity.samples) == pytest.approx(expected, abs=1e-5)


def test_a_model_that_knows_nothing_is_uniform(tmp_path: Path):
    subject = model("llama_untied")
    nn.init.zeros_(subject.lm_head.weight)
    token, byte = perplexity.Perplexity.parse({"data": text_file(tmp_path)}).evaluate(subject, tiny_tokenizer())
    assert token.quantity.value == pytest.approx(SIZE, rel=1e-6) == token.baselines["uniform"]
    assert byte.quantity.value == pytest.approx(byte.baselines["uniform"], rel=1e-6)


def test_the_unigram_baseline_by_hand(tmp_path: Path):
    assert perplexity.unigram([5, 5, 6], 10) == pytest.approx(-(2 * math.log(3 / 13) + math.log(2 / 13)) / 3)
    task = perplexity.Perplexity.parse({"data": text_file(tmp_path)})
    token, byte = task.evaluate(model("llama"), tiny_tokenizer())
    for name in ("unigram", "uniform"):
        ratio = math.log(token.baselines[name]) / byte.baselines[name]
        assert ratio == pytest.approx(math.log(token.quantity.value) / byte.quantity.value)


@pytest.mark.parametrize("together", [1, 3, 50])
def test_pseudo_perplexity_by_hand(together: int, tmp_path: Path):
    subject, tokenizer = model("bert"), tiny_tokenizer(encoder=True)
    content = TEXT[:90]
    options = {"data": text_file(tmp_path, content), "max_length": 14, "batch_size": 5, "together": together}
    (score,) = perplexity.Perplexity.parse(options).evaluate(subject, tokenizer)
    ids = tokenizer(content, add_special_tokens=False)["input_ids"]
    total = 0.0
    for start in range(0, len(ids), 12):
        piece = ids[start : start + 12]
        passes = math.ceil(len(piece) / together)
        for at, key in enumerate(piece):
            shown = [3 if place % passes == at % passes else other for place, other in enumerate(piece)]
            with torch.no_grad():
                logits = subject(input_ids=torch.tensor([[1, *shown, 2]])).logits[0, at + 1]
            total -= float(logits.double().log_softmax(-1)[key])
    assert score.metric == "pseudo_perplexity_per_token"
    assert math.log(score.quantity.value) == pytest.approx(total / len(ids), abs=1e-5)
    assert np.mean(score.quantity.samples) == pytest.approx(total / len(ids), abs=1e-5)


def test_masked_windows_need_a_mask_and_room():
    tokens = tokenize(tiny_tokenizer(), TEXT)
    with pytest.raises(TautError, match="has no mask token"):
        masked_windows(tokens, tiny_tokenizer(), 16)
    with pytest.raises(TautError, match="max_length = 2 leaves no room"):
        masked_windows(tokens, tiny_tokenizer(encoder=True), 2)
    with pytest.raises(TautError, match="the text has 1 tokens; expected at least 2"):
        tokenize(tiny_tokenizer(), "x")


# agreement


@pytest.mark.parametrize(
    ("family", "head"), [("llama", "default"), ("bert", "default"), ("bert", "base"), ("t5", "base")]
)
def test_a_model_agrees_with_itself_exactly(family: str, head: str):
    subject, twin = (model(family, head=head) for _ in range(2))
    task = agreement.Agreement.parse({"limit": 3000, "max_length": 40})
    result = values(task.evaluate(subject, tiny_tokenizer(encoder=True), reference=twin))
    language = {"kl_to_original": 0.0, "top1_agreement": 1.0}
    assert result == (language if head == "default" else {"pooled_cosine": 1.0, "state_cosine": 1.0})


def test_divergence_equals_the_formula_of_torch():
    generator = torch.Generator().manual_seed(1)
    original, variant = (torch.randn(7, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = nn.functional.kl_div(
        variant.log_softmax(-1), original.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(agreement.divergence(original, variant), expected)
    assert agreement.divergence(original, original).tolist() == [0.0] * 7
    original[:, 0] = float("-inf")
    assert agreement.divergence(original, variant).isfinite().all()


def test_causal_agreement_by_hand(tmp_path: Path):
    subject, reference, tokenizer = model("llama", seed=1), model("llama"), tiny_tokenizer()
    options = {"data": text_file(tmp_path, TEXT[:100]), "max_length": 128}
    scores = agreement.Agreement.parse(options).evaluate(subject, tokenizer, reference=reference)
    ids = torch.tensor([[1, *tokenizer(TEXT[:100], add_special_tokens=False)["input_ids"]]])
    with torch.no_grad():
        p, q = (net(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for net in (reference, subject))
    result = values(scores)
    assert result["kl_to_original"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), abs=1e-6)
    assert result["top1_agreement"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert result["kl_to_original"] > 0


def test_strangers_have_lower_cosines():
    task, tokenizer = agreement.Agreement.parse({"limit": 2000}), tiny_tokenizer(encoder=True)
    scores = task.evaluate(model("bert", head="base"), tokenizer, reference=model("bert", head="base", seed=1))
    assert all(-1 <= score.quantity.value < 0.9 for score in scores)
    assert all(score.quantity.value == pytest.approx(np.mean(score.quantity.samples)) for score in scores)


def test_agreement_needs_a_reference_of_its_kind():
    task, tokenizer = agreement.Agreement.parse({"limit": 500}), tiny_tokenizer(encoder=True)
    with pytest.raises(TautError, match="needs the original model"):
        task.evaluate(model("bert"), tokenizer)
    with pytest.raises(TautError, match="the reference gives states, the model masked"):
        task.evaluate(model("bert"), tokenizer, reference=model("bert", head="base"))
    with pytest.raises(TautError, match="the reference has 330 tokens, the model 320"):
        task.evaluate(model("llama"), tokenizer, reference=tiny("llama", vocab_size=330))
    with pytest.raises(TautError, match="the reference has width 16, the model 32"):
        task.evaluate(model("bert", head="base"), tokenizer, reference=model("bert", head="base", hidden_size=16))


# Real data


def test_a_real_decoder_knows_its_stories():
    folder = Path(os.environ.get("TAUT_DATA", "missing")).parent / "models" / "stories260K"
    if not (folder.is_dir() and data.available("tinystories")):
        pytest.skip("needs tinystories in TAUT_DATA, and models/stories260K beside it")
    subject, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    task = perplexity.Perplexity.parse({"data": "tinystories", "limit": 20_000})
    token, byte = task.evaluate(subject, tokenizer)
    assert token.quantity.value == pytest.approx(4.06, abs=0.02)
    assert byte.quantity.value == pytest.approx(0.96, abs=0.01)
    assert token.baselines["unigram"] > 100


# loss_by_position


def test_loss_by_position_by_hand(tmp_path: Path):
    subject, tokenizer = model("llama"), tiny_tokenizer()
    options = {"data": text_file(tmp_path, TEXT * 3), "max_length": 40}
    result = values(loss_by_position.LossByPosition.parse(options).evaluate(subject, tokenizer))
    ids = tokenizer(TEXT * 3, add_special_tokens=False)["input_ids"]
    nats = []
    for start in range(0, len(ids) - 38, 39):
        row = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + 39]]])
        scores = subject(row).logits[0, :-1].detach().double()
        nats.append(nn.functional.cross_entropy(scores, row[0, 1:], reduction="none"))
    table = torch.stack(nats)
    first, second = table[:, :15].mean(), table[:, 15:31].mean()
    assert result["loss_at_1_to_15"] == pytest.approx(float(first), abs=1e-5)
    assert result["loss_at_16_to_31"] == pytest.approx(float(second), abs=1e-5)
    assert result["gain_of_last_doubling"] == pytest.approx(float(first - second), abs=1e-5)
    assert len(result) == 3


def test_loss_by_position_keeps_falling_only_where_context_is_seen(tmp_path: Path):
    """A model that copies from far back gains by context; under a short window it does not."""
    subject = model("llama", max_position_embeddings=128)
    options = {"data": text_file(tmp_path, TEXT * 8), "max_length": 128}
    tokenizer = tiny_tokenizer()
    ids = torch.tensor([tokenizer(TEXT * 8, add_special_tokens=False)["input_ids"][: 127 * 6]]).view(6, 127)
    rows = torch.cat([torch.full((6, 1), tokenizer.bos_token_id), ids], 1)
    optimizer = torch.optim.Adam(subject.parameters(), 1e-2)
    subject.train()
    for _ in range(60):
        optimizer.zero_grad()
        subject(rows, labels=rows).loss.backward()
        optimizer.step()
    whole = values(loss_by_position.LossByPosition.parse(options).evaluate(subject, tokenizer))
    short = taut.apply(subject, {"memory": {"method": "window_sink", "sinks": 0, "window": 2}})
    cut = values(loss_by_position.LossByPosition.parse(options).evaluate(short, tokenizer))
    assert whole["loss_at_64_to_127"] < cut["loss_at_64_to_127"]


def test_loss_by_position_says_what_it_needs(tmp_path: Path):
    task = loss_by_position.LossByPosition.parse({"data": text_file(tmp_path, TEXT[:90])})
    with pytest.raises(TautError, match="expected at least 2 of each"):
        task.evaluate(model("llama"), tiny_tokenizer())
    assert "does not predict the next token" in task.fits(model("bert"))
    assert loss_by_position.places(100) == [(1, 16), (16, 32), (32, 64)]


@pytest.mark.parametrize(
    "memory", [None, {"method": "window_sink", "sinks": 1, "window": 6}, {"method": "anchor", "every": 5}]
)
@pytest.mark.parametrize("cached", [1, 7])
def test_through_the_cache_or_at_once_is_the_same(memory: dict | None, cached: int, tmp_path: Path):
    subject = tiny("llama", vocab_size=SIZE, dtype=torch.float64)
    if memory:
        taut.apply(subject, {"memory": memory})
    options = {"data": text_file(tmp_path, TEXT[:150]), "max_length": 40}
    for task in (perplexity.Perplexity, loss_by_position.LossByPosition):
        at_once = values(task.parse(options).evaluate(subject, tiny_tokenizer()))
        pieces = values(task.parse(options | {"cached": cached}).evaluate(subject, tiny_tokenizer()))
        assert pieces == pytest.approx(at_once, rel=1e-6)


# key_value_recall


def test_recall_texts_hold_every_key_once_with_its_value():
    for text, question, answer, among in key_value_recall.documents(20, 12, 3, seed=4):
        segments = [segment.split() for segment in text.rstrip(".").split(". ")]
        assert len({segment[0] for segment in segments}) == len(segments) == 12
        assert all(len(segment) == 6 and segment[1] == "=" for segment in segments)
        assert {segment[0]: segment[2] for segment in segments}[question.split()[0]] == answer
        assert [segment[2] for segment in segments] == among
    assert key_value_recall.documents(3, 4, 1, seed=1) == key_value_recall.documents(3, 4, 1, seed=1)
    assert key_value_recall.documents(3, 4, 1, seed=1) != key_value_recall.documents(3, 4, 1, seed=2)
    bare = key_value_recall.documents(20, 12, 3, seed=4, between="")
    assert [text.replace(" =", "") for text, *_ in key_value_recall.documents(20, 12, 3, seed=4)] == [
        text for text, *_ in bare
    ]
    assert all(question in text.split() for text, question, *_ in bare)
    keys, values, fillers = key_value_recall.words()
    assert len({*keys, *values, *fillers}) == 64 + 64 + 128


@pytest.mark.parametrize("cached", [None, 9])
def test_recall_is_right_where_the_right_value_has_the_highest_logit(cached: int | None):
    subject, tokenizer = model("llama", max_position_embeddings=512), tiny_tokenizer()
    options = {"limit": 30, "pairs": 3, "fillers": 1} | ({} if cached is None else {"cached": cached})
    task = key_value_recall.KeyValueRecall.parse(options)
    score = task.evaluate(subject, tokenizer, seed=3)[0]
    right = []
    for text, question, answer, among in key_value_recall.documents(30, 3, 1, seed=0):
        ids = tokenizer(f"{text} {question}", return_tensors="pt").input_ids
        begins = [tokenizer(f" {value}", add_special_tokens=False).input_ids[0] for value in among]
        if len(set(begins)) == 3:
            last = subject(ids).logits[0, -1]
            right.append(float(among[int(last[begins].argmax())] == answer))
    assert sorted(score.quantity.samples) == sorted(right)
    assert score.baselines == {"chance": 1 / 3}
    with pytest.raises(TautError, match="begin with the same token"):
        key_value_recall.KeyValueRecall.parse({"pairs": 64, "limit": 2}).evaluate(subject, tokenizer)
    assert "does not predict the next token" in task.fits(model("bert"))
