"""``taut.tokenizer``: for a name, for an opened model, and for one that was compressed from another."""

from pathlib import Path

import pytest

import taut

SCRATCH = "llama:hidden_size=32,num_hidden_layers=1,vocab_size=99"


def ids(model: object) -> list[int]:
    return taut.tokenizer(model)("Hello")["input_ids"]


def test_of_a_name_and_of_what_was_opened_and_written(tmp_path: Path) -> None:
    compressed = taut.apply("minilm", {"embedding": "low_bit"}, tmp_path / "small", text=None)
    for model in ("minilm", taut.load("minilm"), compressed, tmp_path / "small", taut.load(tmp_path / "small")):
        assert ids(model) == [101, 7592, 102]


def test_of_the_original_where_the_folder_has_none(tmp_path: Path) -> None:
    compressed = taut.apply("minilm", {"embedding": "low_bit"}, text=None)
    compressed.save_pretrained(tmp_path / "bare")
    assert ids(taut.load(tmp_path / "bare")) == [101, 7592, 102]
    with pytest.raises(taut.TautError, match=r"tokenizer: none beside .*bare; open it"):
        taut.tokenizer(tmp_path / "bare")


def test_of_models_without_one() -> None:
    for model, name in ((SCRATCH, "llama:"), (taut.load(SCRATCH), "this LlamaForCausalLM")):
        with pytest.raises(taut.TautError, match=f"tokenizer: none beside {name}"):
            taut.tokenizer(model)
