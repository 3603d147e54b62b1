"""Healing: what learns, what stays, the same bits twice, and going on where a run was cut off."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from folders import tiny_folder
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

import taut
from taut import data
from taut.cli import app
from taut.contract.tiny import inputs, tiny
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.healing.runs import newest
from taut.healing.settings import Healing
from taut.healing.trainer import optimizer
from taut.healing.unpack import unpacked
from taut.methods.part import Part
from taut.surgery.apply import apply

LOW_RANK = {"embedding": {"method": "low_rank", "rank": 8}}
STORED = {"embedding": {"method": "low_rank", "rank": 16, "store": {"method": "low_bit", "bits": 4}}}
NESTED = {"embedding": {"method": "matryoshka", "width": 16, "nested": True}}
FEEDFORWARD = {"feedforward": {"method": "low_rank", "rank": 12, "layers": ":"}}
WITH_LINEAR = {**LOW_RANK, "feedforward": {"method": "low_rank", "rank": 12}}


def pair(
    family: str = "bert", recipe: dict = LOW_RANK, dtype: torch.dtype = torch.float32, head: str = "default"
) -> tuple[PreTrainedModel, PreTrainedModel, list[dict[str, Tensor]]]:
    original = tiny(family, dtype=dtype, head=head)
    model = copy.deepcopy(original)
    apply(model, Recipe.parse(recipe))
    return model, original, [inputs(model, 8, 12, seed=seed) for seed in range(3)]


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize(
    ("family", "head", "target"),
    [
        ("bert", "base", "hidden+vectors"),
        ("bert", "default", "hidden+logits"),
        ("llama", "default", "hidden+logits"),
        ("t5", "default", "hidden+logits"),
        ("bart", "base", "hidden"),
        ("bert", "BertForSequenceClassification", "hidden+logits"),
    ],
)
def test_only_parts_learn(family: str, head: str, target: str) -> None:
    model, original, batches = pair(family, STORED if family == "llama" else LOW_RANK, head=head)
    before, teacher = bits(model), bits(original)
    own = {
        f"{name}.{inner}"
        for name, part in model.named_modules()
        if isinstance(part, Part)
        for inner in part.state_dict()
    }
    facts = taut.heal(model, original, batches=batches, steps=25)
    after = bits(model)
    assert facts["target"] == target
    assert facts["loss_last"] < facts["loss_first"]
    assert list(after) == list(before)
    assert all(after[name].shape == before[name].shape for name in after)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert changed <= own
    assert same(teacher, bits(original))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_linear_parts_learn_too() -> None:
    model, original, batches = pair("gpt2", WITH_LINEAR)
    before = bits(model)
    taut.heal(model, original, batches=batches, steps=3)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert any("mlp" in name for name in changed)
    assert any("wte" in name for name in changed)


def test_more_than_parts_learns_when_asked() -> None:
    expected = {"norms": "LayerNorm", "body": "query", "all": "query", "adapters": "query"}
    for train, learns in expected.items():
        model, original, batches = pair(recipe=FEEDFORWARD)
        before = bits(model)
        facts = taut.heal(model, original, batches=batches, steps=12, train=train, rank=2)
        assert facts["loss_last"] < facts["loss_first"]
        assert list(bits(model)) == list(before), "adapters leave no tensors behind"
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert any(learns in name for name in changed)
        assert any("intermediate" in name for name in changed)
        assert (train == "all") == any("word_embeddings" in name for name in changed)
        assert (learns == "query") == any("query" in name for name in changed)


def test_undo_is_refused_once_more_than_parts_has_learned() -> None:
    for train in ("parts", "norms", "adapters", "all"):
        model, original, batches = pair(recipe=FEEDFORWARD)
        assert taut.heal(model, original, batches=batches, steps=12, train=train, rank=2)["kept"]
        if train == "parts":
            taut.undo(model)
            assert same(bits(model), bits(original))
        else:
            with pytest.raises(TautError, match="healed beyond its parts"):
                taut.undo(model)


def test_adapters_change_a_map_by_their_rank_and_go_when_healing_fails() -> None:
    model, original, batches = pair("llama", FEEDFORWARD)
    query = model.model.layers[0].self_attn.q_proj
    before = query.weight.detach().clone()
    taut.heal(model, original, batches=batches, steps=6, train="adapters", rank=2)
    assert model.model.layers[0].self_attn.q_proj is query
    change = (query.weight - before).double()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) == 2
    state = bits(model)
    with torch.no_grad():
        original.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(TautError, match="the loss is nan"):
        taut.heal(model, original, batches=batches, steps=6, train="adapters", rank=2)
    assert same(state, bits(model))
    four = {"method": "low_rank", "rank": 4, "layers": ":"}
    whole = {"projection": four, "feedforward": four}
    model, original, batches = pair("llama", whole)
    with pytest.raises(TautError, match="left no map dense"):
        taut.heal(model, original, batches=batches, steps=2, train="adapters")


@pytest.mark.parametrize("target", ["layers", "vectors", "labels", "hidden+layers+vectors+logits+labels"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_target_is_lowered(family: str, target: str) -> None:
    model, original, batches = pair(family, FEEDFORWARD)
    if family == "bert":
        asked = torch.rand(batches[0]["input_ids"].shape, generator=torch.Generator().manual_seed(1)) < 0.3
        batches = [{**batch, "labels": batch["input_ids"].masked_fill(~asked, -100)} for batch in batches]
    facts = taut.heal(model, original, batches=batches, steps=30, target=target, train="all")
    assert facts["target"] == target
    assert facts["loss_last"] < facts["loss_first"]
    assert facts["kept"]


def test_same_seed_same_bits_and_another_seed_others() -> None:
    results = []
    for seed in (0, 0, 1):
        model, original, batches = pair()
        torch.manual_seed(len(results))
        state = torch.random.get_rng_state()
        taut.heal(model, original, batches=batches, steps=4, seed=seed)
        assert torch.equal(state, torch.random.get_rng_state())
        results.append(bits(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_what_learns_by_drawing_draws_while_it_is_healed() -> None:
    model, original, batches = pair(recipe=NESTED)
    (part,) = (module for module in model.modules() if isinstance(module, Part))
    drawn: list[int] = []

    def note(module: nn.Module, *call: object) -> None:
        if module.training:
            drawn.append(module.drawn)

    part.register_forward_hook(note)
    taut.heal(model, original, batches=batches, steps=12)
    assert len(drawn) == 12
    assert set(drawn) == set(part.widths)
    assert not part.training


class Cut(BaseException):
    """As abrupt as a keyboard interrupt."""


@pytest.mark.parametrize("recipe", [LOW_RANK, STORED, NESTED], ids=["low_rank", "stored", "nested"])
def test_a_run_cut_off_goes_on_to_the_same_bits(tmp_path: Path, recipe: dict) -> None:
    model, original, batches = pair(recipe=recipe)
    start = bits(model)
    whole = taut.heal(model, original, batches=batches, steps=9)
    expected = bits(model)

    model, original, batches = pair(recipe=recipe)
    state = tmp_path / "state"
    seen: list[int] = []

    def cut(done: int, total: int) -> None:
        seen.append(done)
        if done == 5:
            raise Cut

    from taut.healing.heal import heal

    with pytest.raises(Cut):
        heal(model, original, (), 9, batches=batches, state=state, seconds=0, progress=cut)
    assert same(start, bits(model)), "a failure leaves the model as it was"
    assert newest(state).name == "checkpoint-4"
    # A checkpoint that was cut off while it was written is not used.
    (state / "checkpoint-7").mkdir()
    (state / "checkpoint-7" / "trainer_state.json").write_text('{"global_')
    seen.clear()
    facts = heal(model, original, (), 9, batches=batches, state=state, progress=lambda done, total: seen.append(done))
    assert seen == [5, 6, 7, 8, 9]
    assert same(expected, bits(model))
    assert facts == whole
    assert not state.exists()


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    from taut.healing.heal import heal

    model, original, batches = pair()

    def cut(done: int, total: int) -> None:
        raise Cut

    with pytest.raises(Cut):
        heal(model, original, (), 4, batches=batches, state=tmp_path / "s", progress=cut)
    with pytest.raises(TautError, match="another healing run \\(steps 4, now 5\\)"):
        heal(model, original, (), 5, batches=batches, state=tmp_path / "s")
    with pytest.raises(TautError, match="another healing run \\(batches"):
        heal(model, original, (), 4, batches=batches[:1], state=tmp_path / "s")


def test_checkpoints_hold_only_what_learns(tmp_path: Path) -> None:
    from safetensors import safe_open

    from taut.healing.heal import heal

    model, original, batches = pair()
    table = model.get_input_embeddings()

    def cut(done: int, total: int) -> None:
        if done == 2:
            raise Cut

    with pytest.raises(Cut):
        heal(model, original, (), 3, batches=batches, state=tmp_path / "s", seconds=0, progress=cut)
    with safe_open(newest(tmp_path / "s") / "model.safetensors", "pt") as file:
        shapes = sorted(tuple(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert shapes == sorted(tuple(parameter.shape) for parameter in table.parameters())


def test_no_steps_change_nothing() -> None:
    model, original, batches = pair()
    before = bits(model)
    assert taut.heal(model, original, batches=batches, steps=0) == {}
    assert same(before, bits(model))
    assert "healed" not in model.hf_quantizer.quantization_config.to_dict()


def test_half_precision_comes_back(tmp_path: Path) -> None:
    model, original, batches = pair("llama", dtype=torch.bfloat16)
    frequencies = dict(model.named_buffers())
    before = {name: tensor.dtype for name, tensor in frequencies.items()}
    trunk = model.model.layers[0].mlp.up_proj.weight.clone()
    facts = taut.heal(model, original, batches=batches, steps=20)
    assert facts["loss_last"] < facts["loss_first"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {name: tensor.dtype for name, tensor in model.named_buffers()} == before
    assert model.get_input_embeddings()(torch.tensor([1])).dtype == torch.bfloat16
    assert torch.equal(trunk, model.model.layers[0].mlp.up_proj.weight)


def test_the_record_survives_saving(tmp_path: Path) -> None:
    model, original, batches = pair()
    facts = taut.heal(model, original, batches=batches, steps=2)
    model.save_pretrained(tmp_path / "m")
    again = taut.load(tmp_path / "m")
    assert same(bits(model), bits(again))
    assert taut.show(tmp_path / "m")["healed"] == facts
    assert again.hf_quantizer.quantization_config.healed == facts


def test_steps_follow_the_size_of_a_tensor() -> None:
    model, original, _ = pair(recipe=FEEDFORWARD)
    with torch.no_grad():
        for layer in model.encoder.layer if "encoder" in dict(model.named_children()) else model.bert.encoder.layer:
            layer.output.dense.weight.mul_(10)
            layer.output.dense.projection.zero_()
    with unpacked(model, original) as steps:
        sizes = {name: steps[tensor] for name, tensor in model.named_parameters() if tensor in steps}
    large = [size for name, size in sizes.items() if "output.dense.weight" in name]
    zeros = [size for name, size in sizes.items() if "output.dense.projection" in name]
    assert zeros == pytest.approx([1e-3] * len(zeros)), "no step of nothing, and the whole way to go"
    assert min(large) > 10 * max(zeros)
    assert [group["lr"] for group in optimizer(steps, 0.1).param_groups] == pytest.approx(
        [0.1 * s for s in steps.values()]
    )


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    model, original, batches = pair()
    cases = {
        "heal: unknown key 'stepz'": {"batches": batches, "stepz": 1},
        "heal: train = 'most'": {"batches": batches, "train": "most"},
        "target 'hiden': did you mean 'hidden'": {"batches": batches, "target": "hidden+hiden"},
        "no labels come with": {"batches": batches, "target": "labels"},
        "heal: target = 'logits': by=layer imitates": {"batches": batches, "target": "logits", "by": "layer"},
        "heal: steps = -1": {"batches": batches, "steps": -1},
        "give texts and their tokenizer=": {"texts": ["a text"]},
        "too little text: 1 texts": {"texts": ["a text of words"], "tokenizer": tiny_tokenizer(encoder=True)},
    }
    before = bits(model)
    for message, options in cases.items():
        with pytest.raises(TautError) as caught:
            taut.heal(model, original, **options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(TautError, match="not compressed"):
        taut.heal(original, original, batches=batches)
    base, base_original, _ = pair(head="base")
    with pytest.raises(TautError, match="has no head"):
        taut.heal(base, base_original, batches=batches, target="logits")
    identity = tiny("bert")
    apply(identity, Recipe.parse({"attention": {"method": "local_global", "window": 4}}))
    with pytest.raises(TautError, match="nothing here can learn"):
        taut.heal(identity, original, batches=batches)
    assert same(before, bits(model))


def test_a_loss_that_runs_away_changes_nothing() -> None:
    model, original, batches = pair(recipe=STORED)
    before = bits(model)
    with torch.no_grad():
        original.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(TautError, match="the loss is nan at step 1"):
        taut.heal(model, original, batches=batches, steps=3)
    assert same(before, bits(model))
    assert "healed" not in model.hf_quantizer.quantization_config.to_dict()


def test_the_command_line_heals(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama")
    recipe, text = tmp_path / "r.yaml", tmp_path / "t.txt"
    recipe.write_text("embedding: {method: low_rank, rank: 8}\n")
    text.write_text("\n\n".join(data.paragraphs("python_docstrings", limit=20_000).column(0)))
    words = ["apply", str(folder), str(recipe), "--out", str(tmp_path / "out"), "--text", str(text)]
    result = CliRunner().invoke(
        app, [*words, "--heal", "3", "--heal-option", "batch=8", "--seed", "5", "--json"], catch_exceptions=False
    )
    assert result.exit_code == 0
    healed = taut.show(tmp_path / "out")["healed"]
    assert (healed["steps"], healed["seed"], healed["text"]) == (3, 5, "t.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "out", "r.yaml", "t.txt"]
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "out")]).output
    assert "healed: " in shown
    assert "steps 3" in shown


def test_wrong_words_on_the_command_line(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("embedding: {method: low_rank, rank: 8}\n")
    words = ["apply", str(folder), str(recipe), "--out", str(tmp_path / "out")]
    for more, message in (
        (["--heal", "3", "--text", "none"], "too little text: 0 texts"),
        (["--heal", "3", "--heal-option", "speed=2"], "unknown key 'speed'"),
        (["--heal-option", "batch=2"], "works only with --heal STEPS"),
    ):
        with pytest.raises(TautError, match=message):
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
    assert not (tmp_path / "out").exists()


def test_choices_parse() -> None:
    assert Healing.parse(7, seed=3) == Healing(steps=7, seed=3)
    assert Healing.parse({"steps": 7, "seed": 1}, seed=3).seed == 1
    assert json.loads(Healing.parse(7).model_dump_json())["target"] == "auto"
