"""taut.anchor_token: a token that the tokenizer writes behind every sentence, and its row in the model."""

from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from tiny_tokenizer import SIZE, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import taut
from taut.cli import app
from taut.contract.tiny import tiny
from taut.core.errors import TautError
from taut.surgery.anchor_token import add_anchor_token

TEXT = "One thing. Two, 3.5 things! Three...\nIs that so? Yes."
MARKED = "One thing.<a> Two, 3.5 things!<a> Three...<a>\nIs that so?<a> Yes.<a>"


def metaspace(prepend: bool = False) -> PreTrainedTokenizerFast:
    """As Llama's: spaces become a sign of their own, and one is put in front; with ``prepend`` by a normalizer."""
    letters = sorted(set(TEXT.replace(" ", "")) | {"\u2581"})
    vocabulary = {"<unk>": 0, **{letter: index + 1 for index, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    if prepend:
        tokenizer.normalizer = normalizers.Prepend("\u2581")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("make", [tiny_tokenizer, metaspace])
def test_the_token_stands_behind_every_sentence_and_nowhere_else(make, tmp_path: Path) -> None:
    before = make()
    after = add_anchor_token(tiny("llama", vocab_size=SIZE), before, "<a>", (".", "!", "?"))
    after.save_pretrained(tmp_path)
    for tokenizer in (after, AutoTokenizer.from_pretrained(tmp_path)):
        ids = tokenizer(TEXT).input_ids
        anchor = tokenizer.convert_tokens_to_ids("<a>")
        assert ids.count(anchor) == MARKED.count("<a>")
        assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
        assert "".join(tokenizer.decode(ids).split()) == "".join(MARKED.split())
        # Between anchors nothing else has changed.
        assert [index for index in ids if index != anchor][:8] == before(TEXT).input_ids[:8]
        assert {**before.special_tokens_map}.items() <= {**tokenizer.special_tokens_map}.items()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("start", ["mean", "."])
def test_its_row_begins_as_said_and_no_other_changes(family: str, start: str) -> None:
    model, tokenizer = tiny(family, vocab_size=SIZE), tiny_tokenizer()
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    before = [table.weight.detach().clone() for table in tables]
    index = add_anchor_token(model, tokenizer, "<a>", ".", start).convert_tokens_to_ids("<a>")
    assert index == SIZE
    for old, table in zip(before, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        new = table.weight.detach()
        assert torch.equal(new[:SIZE], old)
        wanted = old.mean(0) if start == "mean" else old[tokenizer.convert_tokens_to_ids(".")]
        assert torch.equal(new[SIZE], wanted)


def test_room_in_the_table_is_used_before_it_grows() -> None:
    model = tiny("llama", vocab_size=SIZE + 8)
    add_anchor_token(model, tiny_tokenizer(), "<a>", ".")
    assert model.get_input_embeddings().num_embeddings == SIZE + 8


def test_the_folder_is_a_model_with_anchors(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama", vocab_size=SIZE)
    tiny_tokenizer().save_pretrained(folder)
    out = tmp_path / "anchored"
    done = CliRunner().invoke(app, ["anchor-token", str(folder), "--out", str(out), "--token", "<a>", "--start", "."])
    assert done.exit_code == 0, done.output
    assert "anchors: ['<a>']" in done.output
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = taut.apply(taut.load(out), {"memory": {"method": "anchor", "anchors": ["<a>"]}}, tokenizer=tokenizer)
    assert taut.prefix(model, TEXT, tokenizer=tokenizer).entries == MARKED.count("<a>")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token": "<pad>"}, "it is there already"),
        ({"token": " "}, "expected a new one"),
        ({"after": ()}, "name the strings"),
        ({"start": "anchors of the sea"}, "is not one token of this tokenizer but"),
    ],
)
def test_wrong_input(change: dict, words: str) -> None:
    arguments = {"token": "<a>", "after": (".",), "start": "mean", **change}
    model = tiny("llama", vocab_size=SIZE)
    with pytest.raises(TautError, match=words):
        add_anchor_token(model, tiny_tokenizer(), **arguments)
    assert model.get_input_embeddings().num_embeddings == SIZE


def test_a_tokenizer_that_would_rewrite_the_token_is_refused() -> None:
    with pytest.raises(TautError, match="leaves as it is"):
        add_anchor_token(tiny("llama", vocab_size=SIZE), metaspace(prepend=True), "<a>", ".")


def test_a_compressed_table_cannot_grow() -> None:
    model = taut.apply(tiny("llama", vocab_size=SIZE), {"embedding": {"method": "low_bit"}})
    with pytest.raises(TautError, match="cannot grow"):
        add_anchor_token(model, tiny_tokenizer(), "<a>", ".")


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny("llama").save_pretrained(folder)
    with pytest.raises(TautError, match="no tokenizer"):
        taut.anchor_token(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
