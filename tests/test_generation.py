"""taut.prefix and taut.generate: what a prefix holds, whom it serves, and what a continuation says of itself."""

import json
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from tiny_tokenizer import SIZE, tiny_tokenizer
from typer.testing import CliRunner

import taut
from taut import data
from taut.cli import app
from taut.contract.tiny import logits, tiny
from taut.core.errors import TautError
from taut.generation import prefix as prefixes
from taut.generation.prefix import Prefix, fingerprint

RECIPES = {
    "none": {},
    "anchor": {"memory": {"method": "anchor", "ids": list(range(3, 60)), "longest": 9}},
    "window_sink": {"memory": {"method": "window_sink", "sinks": 2, "window": 6}},
    "segments": {"memory": {"method": "segment_recurrence", "segment": 4, "memory": 3}},
    "compressive": {"memory": {"method": "compressive", "segment": 3, "memory": 2, "compressed": 2, "rate": 2}},
}


def decoder(recipe: str, dtype: torch.dtype = torch.float64, family: str = "llama"):
    model = tiny(family, dtype=dtype, vocab_size=SIZE)
    return taut.apply(model, RECIPES[recipe]) if RECIPES[recipe] else model


def ids(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, SIZE, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_follows_a_prefix_is_what_follows_the_text(
    recipe: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefixes, "CHUNK", 5)
    model = decoder(recipe, family=family)
    before, after = ids(17), ids(6, seed=1)
    original = taut.prefix(model, before)
    original.save(tmp_path / "deep" / "cache")
    whole = logits(model, input_ids=torch.cat([before, after])[None], use_cache=False)
    for prefix in (original, Prefix.load(tmp_path / "deep" / "cache", model), original):
        cache = prefix.cache()
        step = model(input_ids=after[None], past_key_values=cache, use_cache=True)
        assert (step["logits"] - whole[:, 17:]).abs().max() <= 1e-12
        assert prefix.memory.get_seq_length() == 17
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in original.memory.layers)
    assert original.bytes == held
    assert (original.entries < 17) == (recipe != "none")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["cache"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_many_continuations_share_one_prefix(recipe: str) -> None:
    model = decoder(recipe, dtype=torch.float32)
    prefix = taut.prefix(model, ids(17))
    questions = torch.stack([ids(4, seed=seed) for seed in (1, 2, 3)])
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(prefix.before(questions), past_key_values=prefix.cache(3), **options)
    for row, question in zip(together, questions, strict=True):
        alone = model.generate(torch.cat([ids(17), question])[None], **options)
        assert torch.equal(row, alone[0])


def test_a_prefix_serves_only_its_own_model(tmp_path: Path) -> None:
    taut.prefix(decoder("anchor"), ids(9), out=tmp_path / "c")
    other = decoder("anchor")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    moved = tiny(
        "llama", dtype=torch.float64, vocab_size=SIZE, rope_parameters={"rope_type": "default", "rope_theta": 5.0}
    )
    for model in (decoder("none"), decoder("window_sink"), decoder("anchor", torch.float32), other, moved):
        with pytest.raises(TautError, match="made with another model, recipe or position scheme"):
            Prefix.load(tmp_path / "c", model)
    assert fingerprint(decoder("anchor")) == fingerprint(decoder("anchor"))
    (tmp_path / "noise").write_bytes(b"no prefix at all")
    for name in ("noise", "missing"):
        with pytest.raises(TautError, match="not readable as a prefix"):
            Prefix.load(tmp_path / name, other)


def test_wrong_texts_are_told() -> None:
    model = decoder("anchor")
    with pytest.raises(TautError, match="an empty text has no prefix"):
        taut.prefix(model, "", tokenizer=tiny_tokenizer())
    with pytest.raises(TautError, match="needs the model's tokenizer"):
        taut.prefix(model, "words")
    with pytest.raises(TautError, match=r"900 tokens, but LlamaForCausalLM has \d+ positions"):
        taut.prefix(model, ids(900))
    with pytest.raises(TautError, match="needs a decoder"):
        taut.prefix(tiny("bert", vocab_size=SIZE), ids(4))
    with pytest.raises(TautError, match="needs a decoder"):
        taut.generate(tiny("bert", vocab_size=SIZE), "words", tokenizer=tiny_tokenizer())
    for prompt, message in (("", "the prompt is empty"), ("word " * 900, "shorten the text")):
        with pytest.raises(TautError, match=message):
            taut.generate(model, prompt, tokenizer=tiny_tokenizer())
    with pytest.raises(TautError, match="no tokenizer beside the model"):
        taut.generate(model, "words")


@pytest.mark.parametrize("recipe", RECIPES)
def test_generated_text_says_what_it_cost(recipe: str) -> None:
    model, tokenizer = decoder(recipe, dtype=torch.float32), tiny_tokenizer()
    text = data.paragraphs("python_topics", limit=2_000).column(0)[0][:90]
    pieces: list[str] = []
    result = taut.generate(model, text, tokenizer=tokenizer, tokens=12, on_text=pieces.append)
    prompt = tokenizer(text, return_tensors="pt").input_ids
    plain = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(result.ids, plain[0, prompt.shape[1] :])
    assert "".join(pieces) == result.text == tokenizer.decode(result.ids, skip_special_tokens=True)
    seen = prompt.shape[1] + len(result.ids) - 1
    config = model.config
    entry = 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert result.full_cache_bytes == seen * entry
    assert (result.cache_bytes == result.full_cache_bytes) == (recipe == "none")
    assert 0 < result.first_seconds < result.seconds
    drawn = [
        taut.generate(model, text, tokenizer=tokenizer, tokens=12, temperature=5.0, seed=seed).ids for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_whole_model_in_few_bits_generates_and_counts_itself() -> None:
    """With parts in other slots, table and head among them, beside the memory."""
    light = {slot: {"method": "low_bit"} for slot in ("embedding", "projection", "feedforward")}
    model = taut.apply(tiny("llama", vocab_size=SIZE), light | RECIPES["anchor"])
    result = taut.generate(model, "One sentence. Another", tokenizer=tiny_tokenizer(), tokens=4)
    plain = taut.generate(tiny("llama", vocab_size=SIZE), "One sentence. Another", tokenizer=tiny_tokenizer(), tokens=4)
    assert result.full_cache_bytes == plain.full_cache_bytes > result.cache_bytes
    numbers = sum(parameter.numel() for parameter in tiny("llama", vocab_size=SIZE).parameters())
    for recipe in ({}, RECIPES["anchor"], {"embedding": light["embedding"]} | RECIPES["anchor"]):
        other = tiny("llama", vocab_size=SIZE)
        report = str(taut.footprint(taut.apply(other, recipe) if recipe else other))
        assert f" {numbers / 1e6:.2f} M parameters" in report


def test_the_command_line_reads_once_and_goes_on(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama")
    recipe, text = tmp_path / "r.yaml", tmp_path / "t.txt"
    recipe.write_text("memory: {method: anchor}\n")
    text.write_text("One sentence. Another one.")
    run = CliRunner()
    for words in (
        ["apply", str(folder), str(recipe), "--out", str(tmp_path / "a")],
        ["prefix", str(tmp_path / "a"), "--text-file", str(text), "--out", str(tmp_path / "p")],
    ):
        assert run.invoke(app, words, catch_exceptions=False).exit_code == 0
    words = ["generate", str(tmp_path / "a"), "--prompt", "And so", "--tokens", "5"]
    shown = run.invoke(app, [*words, "--prefix", str(tmp_path / "p")], catch_exceptions=False).output
    assert shown.count("And so") == 1
    assert "from the prefix + " in shown
    whole = run.invoke(app, [*words[:3], text.read_text() + "And so", *words[4:]], catch_exceptions=False).output
    assert "from the prefix" not in whole
    for more, message in (
        (["--prompt-file", str(text)], "give --prompt or --prompt-file, not both"),
        (["--prefix", str(text)], "not readable as a prefix"),
    ):
        with pytest.raises(TautError, match=message):
            run.invoke(app, [*words, *more], catch_exceptions=False)
    with pytest.raises(TautError, match="cannot read it"):
        run.invoke(app, ["generate", str(folder), "--prompt-file", str(tmp_path)], catch_exceptions=False)
    last = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]["plan"][0]["knobs"]
    assert last["anchors"] == [".", "!", "?"]
    assert last["ids"]
