"""Text to train on: what is held out, rows, masks, tokenizers."""

from pathlib import Path

import pytest
import torch
from runs import LLAMA, SMALL, TEXT

from taut import data
from taut.core.errors import TautError
from taut.training.corpus import read_corpus
from taut.training.objective import IGNORED
from taut.training.spec import TrainSpec
from taut.training.token_rows import Masking, TokenRows, TrainingSet, spread, token_rows
from taut.training.tokenizer import LEAST, byte_level, make_tokenizer


def test_every_epoch_has_all_rows_once() -> None:
    rows = TokenRows(torch.arange(60, dtype=torch.int32).reshape(6, 10))
    stream = TrainingSet(rows, 12, 2, seed=3)
    epochs = [[int(stream[position]["input_ids"][0]) // 10 for position in range(start, start + 6)] for start in (0, 6)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(6))
    assert epochs[0] != epochs[1]
    item = stream[0]
    assert torch.equal(item["labels"][:-1], item["input_ids"][1:])
    assert item["labels"][-1] == IGNORED
    repeated = TrainingSet(rows, 12, 2, 3, batch_of=lambda step: step % 2)
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
    item = TrainingSet(padded, 2, 2, 0)[0]
    assert set(item) == {"input_ids", "labels", "attention_mask"}
    assert int((item["labels"] != IGNORED).sum()) == int(item["attention_mask"].sum()) - 1
    assert TrainingSet(padded, 4, 2, 0).tokens(2) == 40
    assert len(spread(packed, 1)) == 1


def test_masked_rows_hide_the_same_number_of_tokens() -> None:
    tokenizer = byte_level(LEAST, (), framed=True)
    rows = token_rows(["a text that is long enough " * 20], tokenizer, TrainSpec.load(SMALL), True)
    stream = TrainingSet(rows, 40, 4, 0, Masking(0.25, tokenizer.mask_token_id, len(tokenizer)))
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
    from taut.surgery.loading import resolve

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


def test_documents_keep_their_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One.\n  Two.\n\nThree.")
    assert data.documents(str(tmp_path / "a.txt")).rows == (("One.\n  Two.\n\nThree.",),)
    assert len(data.documents("builtin").rows) == 1
