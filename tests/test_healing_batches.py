"""What healing learns from: the losses, and the batches that a text becomes."""

import math

import pytest
import torch
from tiny_tokenizer import SIZE, tiny_tokenizer

from taut import data
from taut.contract.tiny import tiny
from taut.data.token_rows import text_rows
from taut.healing.batches import next_tokens, text_batches
from taut.healing.losses import divergence, imitation, relative_error, similarity_error, text_loss


def test_losses_are_shares_and_nats() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(50, 6, generator=generator, dtype=torch.float64) * 7 + 3
    assert float(relative_error(teacher, teacher)) == 0
    mean = teacher.mean(0, keepdim=True).expand_as(teacher)
    assert float(relative_error(mean, teacher)) == pytest.approx(1)
    student = torch.randn(50, 6, generator=generator, dtype=torch.float64)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert float(divergence(student, teacher)) == pytest.approx(float((p * (p / q).log()).sum(-1).mean()))
    both = imitation({"hidden": student, "logits": student}, {"hidden": teacher, "logits": teacher})
    assert float(both) == pytest.approx(float(relative_error(student, teacher) + divergence(student, teacher)))


def test_similarities_are_compared_between_texts_alone() -> None:
    teacher = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    cosines = torch.tensor([0.6, 0.0, 0.6, 0.8, 0.0, 0.8], dtype=torch.float64)
    turned = teacher @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    assert float(similarity_error(turned, teacher)) == pytest.approx(0)
    same_vector = teacher[:1].expand(3, 2)
    expected = float((1 - cosines).square().mean() / cosines.var(unbiased=False))
    assert float(similarity_error(same_vector, teacher)) == pytest.approx(expected)
    assert float(similarity_error(teacher[:1], teacher[:1])) == 0


def test_the_text_itself_asks_for_the_token_that_follows() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0]])
    labels = next_tokens(ids, ids != 0)
    assert labels.tolist() == [[6, 7, -100, -100], [9, -100, -100, -100]]
    logits = torch.zeros(2, 4, 10, dtype=torch.float64)
    logits[0, 0, 6] = 100
    assert float(text_loss(logits, labels)) == pytest.approx(2 / 3 * math.log(10))


def test_texts_become_batches() -> None:
    tokenizer = tiny_tokenizer(encoder=True)
    model = tiny("bert", head="base", vocab_size=SIZE)
    texts = data.paragraphs("python_topics", limit=20_000).column(0)
    batches = text_batches(tokenizer, texts, model, size=8, length=32, seed=3)
    rows = [
        ids[mask.bool()].tolist()
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(text_rows(tokenizer, texts, 32))
    assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows)
    assert max(map(len, rows)) <= 32
    assert all(len(batch["input_ids"]) <= 8 for batch in batches)
    again = text_batches(tokenizer, texts, model, size=8, length=32, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    other = text_batches(tokenizer, texts, model, size=8, length=32, seed=4)
    assert any(not torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, other, strict=False))
    padding = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
    assert padding < 0.2 * sum(map(len, rows))


def test_masked_language_models_find_tokens_hidden() -> None:
    tokenizer = tiny_tokenizer(encoder=True)
    texts = data.paragraphs("python_topics", limit=20_000).column(0)
    for head, share in (("default", 0.15), ("base", 0.0)):
        batches = text_batches(tokenizer, texts, tiny("bert", head=head, vocab_size=SIZE), size=8, length=32)
        real = sum(int(batch["attention_mask"].sum()) for batch in batches)
        hidden = sum(int((batch["input_ids"] == tokenizer.mask_token_id).sum()) for batch in batches)
        assert hidden / real == pytest.approx(share, abs=0.02)


def test_encoder_decoders_read_the_text_on_both_sides() -> None:
    texts = data.paragraphs("python_topics", limit=5_000).column(0)
    batches = text_batches(tiny_tokenizer(), texts, tiny("t5", vocab_size=SIZE), size=4, length=16)
    assert all(torch.equal(batch["decoder_input_ids"], batch["input_ids"]) for batch in batches)
    assert all(torch.equal(batch["decoder_attention_mask"], batch["attention_mask"]) for batch in batches)
