"""Whole journeys of a folder: compress, save, open with other tools, export, undo; and everything that may be wrong."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, pipeline

import taut
from taut.contract.tiny import inputs, logits, tiny
from taut.contract.workers import bits_equal
from taut.surgery.apply import apply
from taut.surgery.loading import resolve

LIGHT = {
    "embedding": {"method": "low_bit", "bits": 8},
    "projection": {"method": "low_bit"},
    "feedforward": {"method": "low_rank", "rank": 8},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "llama")


def test_folder_to_folder(llama: Path, tmp_path: Path) -> None:
    model = taut.apply(llama, LIGHT, tmp_path / "light")
    names = {path.name for path in (tmp_path / "light").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "model.safetensors"} <= names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "light")
    batch = inputs(again)
    assert bits_equal(logits(again, **batch), logits(model, **batch))
    assert bits_equal(logits(taut.load(tmp_path / "light"), **batch), logits(model, **batch))
    assert torch.equal(again.generate(**batch, max_new_tokens=8), model.generate(**batch, max_new_tokens=8))
    text = pipeline("text-generation", model=str(tmp_path / "light"), device="cpu")("abc", max_new_tokens=4)
    assert isinstance(text[0]["generated_text"], str)


def test_base_model_opens_from_a_head_checkpoint(llama: Path, tmp_path: Path) -> None:
    model = taut.apply(llama, LIGHT, tmp_path / "light")
    base = AutoModel.from_pretrained(tmp_path / "light")
    batch = inputs(model)
    with torch.no_grad():
        assert bits_equal(base(**batch).last_hidden_state, model.model(**batch).last_hidden_state)


def test_sharded_checkpoint(llama: Path, tmp_path: Path) -> None:
    model = taut.apply(llama, LIGHT)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    batch = inputs(model)
    assert bits_equal(logits(taut.load(tmp_path / "sharded"), **batch), logits(model, **batch))
    (tmp_path / "sharded" / "model-00002-of-00003.safetensors").unlink(missing_ok=True)
    next((tmp_path / "sharded").glob("*.safetensors")).unlink()
    with pytest.raises(taut.TautError, match="missing"):
        taut.load(tmp_path / "sharded")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_honoured(llama: Path, tmp_path: Path, dtype: str) -> None:
    taut.apply(llama, LIGHT, tmp_path / "light")
    model = taut.load(tmp_path / "light", dtype=dtype)
    kinds = {tensor.dtype for tensor in model.state_dict().values()}
    assert kinds == {getattr(torch, dtype), torch.uint8, torch.int8}
    assert logits(model, **inputs(model)).dtype == getattr(torch, dtype)


def test_device_map(llama: Path, tmp_path: Path) -> None:
    model = taut.apply(llama, LIGHT, tmp_path / "light")
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "light", device_map={"": "cpu"})
    assert bits_equal(logits(mapped, **inputs(model)), logits(model, **inputs(model)))


def test_the_dense_table_is_never_made(llama: Path, tmp_path: Path) -> None:
    taut.apply(llama, LIGHT, tmp_path / "light")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "light")
    table = model.get_input_embeddings()
    assert all(not tensor.is_floating_point() for tensor in table.state_dict().values())
    assert not any(tensor.shape == (96, 32) for tensor in model.state_dict().values())
    with safe_open(tmp_path / "light" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118


def test_export_is_plain(llama: Path, tmp_path: Path) -> None:
    model = taut.apply(llama, {**LIGHT, "projection": {"method": "low_rank", "rank": 8}}, tmp_path / "light")
    kept = taut.export(tmp_path / "light", tmp_path / "dense")
    assert kept == []
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    assert (tmp_path / "dense" / "tokenizer.json").exists()
    code = (
        "import sys, torch, transformers; assert 'taut' not in sys.modules;"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'dense')!r});"
        "print(float(m(torch.arange(5, 17).view(1, 12)).logits.double().sum()))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = float(logits(model, input_ids=torch.arange(5, 17).view(1, 12)).double().sum())
    assert float(printed.split()[-1]) == pytest.approx(here, rel=1e-4, abs=1e-2)


def test_export_names_what_cannot_be_merged(llama: Path, tmp_path: Path) -> None:
    recipe = {"memory": {"method": "window_sink", "sinks": 2, "window": 6}, "embedding": {"method": "low_bit"}}
    taut.apply(llama, recipe, tmp_path / "light")
    assert [name for name, _ in taut.export(tmp_path / "light", tmp_path / "dense")] == ["memory"]


def test_loaded_models_cannot_be_undone(llama: Path, tmp_path: Path) -> None:
    taut.apply(llama, LIGHT, tmp_path / "light")
    with pytest.raises(taut.TautError, match="originals? weights are gone|gone"):
        taut.undo(taut.load(tmp_path / "light"))


def test_no_second_time(llama: Path, tmp_path: Path) -> None:
    model = taut.apply(llama, LIGHT, tmp_path / "light")
    for twice in (model, tmp_path / "light"):
        with pytest.raises(taut.TautError, match="already carries a quantization"):
            taut.apply(twice, LIGHT)
    model = tiny("llama")
    plan = taut.plan(model, LIGHT)
    apply(model, plan)
    with pytest.raises(taut.TautError, match="already carries a quantization"):
        apply(model, plan)


def test_resizing_says_what_to_do() -> None:
    model = tiny("llama")
    taut.apply(model, {"embedding": {"method": "low_bit"}})
    with pytest.raises(taut.TautError, match="original model"):
        model.resize_token_embeddings(100)
    taut.undo(model).resize_token_embeddings(100)
    taut.apply(model, {"embedding": {"method": "low_bit"}})
    assert logits(model, **inputs(model)).shape[-1] == 100


def test_train_and_reload(llama: Path, tmp_path: Path) -> None:
    """Gradient steps on a compressed model move its parts, and the folder holds what was trained."""
    model = taut.apply(llama, LIGHT).train()
    batch = inputs(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    assert any(not torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    model.eval().save_pretrained(tmp_path / "trained")
    assert bits_equal(logits(taut.load(tmp_path / "trained"), **batch), logits(model, **batch))


def test_peft_attaches_and_trains(llama: Path) -> None:
    peft = pytest.importorskip("peft")
    model = taut.apply(llama, {"embedding": {"method": "low_bit"}})
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], r=2))
    batch = inputs(model)
    wrapped(**batch, labels=batch["input_ids"]).loss.backward()
    assert any(parameter.grad is not None for name, parameter in wrapped.named_parameters() if "lora_B" in name)


def test_an_interrupted_apply_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taut.apply(llama, LIGHT, tmp_path / "light", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_failed_apply_in_memory_restores_the_model() -> None:
    model, original = tiny("llama"), tiny("llama")

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taut.apply(model, LIGHT, progress=stop)
    assert bits_equal(logits(model, **inputs(model)), logits(original, **inputs(model)))
    assert model.all_tied_weights_keys == original.all_tied_weights_keys


def test_wrong_folders(llama: Path, tmp_path: Path) -> None:
    cases = {}
    for name in ("no_config", "pickle", "truncated", "garbage"):
        cases[name] = tmp_path / name
        shutil.copytree(llama, cases[name])
    (cases["no_config"] / "config.json").unlink()
    (cases["pickle"] / "model.safetensors").rename(cases["pickle"] / "pytorch_model.bin")
    weights = cases["truncated"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (cases["garbage"] / "model.safetensors").write_bytes(os.urandom(1000))
    for name, words in {
        "no_config": "no config.json",
        "pickle": "pickle",
        "truncated": "truncated",
        "garbage": "not a safetensors file",
    }.items():
        with pytest.raises(taut.TautError, match=words) as caught:
            taut.apply(cases[name], LIGHT)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_missing_key_is_an_error(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(llama, tmp_path / "holes")
    state = load_file(llama / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, tmp_path / "holes" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(taut.TautError, match=r"missing keys.*norm"):
        taut.load(tmp_path / "holes")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"embeding": {"method": "low_bit"}}, "did you mean 'embedding'"),
        ({"embedding": {"method": "lowbit"}}, "did you mean 'low_bit'"),
        ({"embedding": {"method": "low_bit", "bit": 8}}, "did you mean 'bits'"),
        ({"embedding": {"method": "low_bit", "bits": 5}}, "bits"),
        ({"embedding": {"method": "low_rank", "keep": 1.5}}, "keep = 1.5"),
        ({"embedding": {"method": "low_rank", "keep": 0.5, "rank": 4}}, "not both"),
        ({"embedding": {"method": "low_rank"}}, "give keep or rank"),
        ({"embedding": {"method": "identity", "keep": 0.5}}, "no dial"),
        (
            {"feedforward": [{"method": "identity", "layers": "0:"}, {"method": "low_bit", "layers": "1"}]},
            "layer 1 is claimed",
        ),
        ({"feedforward": {"method": "low_bit", "layers": "one"}}, "layers = 'one'"),
        ({"feedforward": {"method": "low_bit", "layers": "7"}}, "fits no site"),
        ({"feedforward": {"method": "low_rank", "rank": 4096}}, "fits no site"),
    ],
)
def test_wrong_recipes(llama: Path, recipe: dict, words: str) -> None:
    with pytest.raises(taut.TautError, match=words):
        taut.plan(llama, recipe)


def test_memory_on_an_encoder_is_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "bert", "bert")
    with pytest.raises(taut.TautError, match="fits no site"):
        taut.plan(folder, {"memory": {"method": "window_sink"}})


def test_other_quantizations_are_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))
    with pytest.raises(taut.TautError, match="gptq"):
        taut.plan(tmp_path / "other", LIGHT)


def test_full_output_folder_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("mine")
    with pytest.raises(taut.TautError, match="not an empty folder"):
        taut.apply(llama, LIGHT, tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(taut.TautError, match="not an empty folder|not a writable folder"):
        taut.apply(llama, LIGHT, tmp_path / "file" / "below")


def test_a_name_is_looked_for_in_the_folder_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny("llama").save_pretrained(tmp_path / "mine")
    monkeypatch.setenv("TAUT_MODELS", str(tmp_path))
    assert resolve("mine").folder == tmp_path / "mine"
    with pytest.raises(taut.TautError, match="yours: no such folder"):
        resolve("yours")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lama:hidden_size=32", "llama"),
        ("llama:hiden_size=32", "hidden_size"),
        ("./nowhere", "no such folder"),
        ("nobody/nothing-here-at-all", "cannot be reached"),
    ],
)
def test_wrong_models(name: str, words: str) -> None:
    with pytest.raises(taut.TautError, match=words):
        taut.plan(name, LIGHT)


def test_scratch_specs() -> None:
    source = resolve("llama:hidden_size=64,num_hidden_layers=3,num_attention_heads=4,vocab_size=128")
    assert (source.config.hidden_size, source.config.num_hidden_layers) == (64, 3)
    plan = taut.plan("llama:hidden_size=64,intermediate_size=128,num_hidden_layers=3,num_attention_heads=4", LIGHT)
    # Three maps each in the second and third layer: the first stays dense.
    assert sum(step.site.slot == "feedforward" for step in plan.steps) == 6
    assert {row[1] for row in plan.untouched} >= {"the recipe does not name this slot"}


def test_plan_predicts_the_file(llama: Path, tmp_path: Path) -> None:
    """The plan's saving is the saving of the files, header aside."""
    plan = taut.plan(llama, LIGHT)
    taut.apply(llama, LIGHT, tmp_path / "light")

    def tensors(path: Path) -> int:
        data = (path / "model.safetensors").read_bytes()
        return len(data) - 8 - int.from_bytes(data[:8], "little")

    assert tensors(llama) - tensors(tmp_path / "light") == plan.before.bytes - plan.after.bytes
