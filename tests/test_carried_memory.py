"""Carried memory: rows of a batch go on where those of the batch before ended, in training and in evaluation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from decoding import install
from runs import LLAMA, small
from test_train import Cut, cut_at, same, weights
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from taut.contract.tiny import inputs, logits, stepwise, tiny
from taut.core.errors import TautError
from taut.healing.losses import IGNORED
from taut.methods.base import LEARNED
from taut.methods.memory.compressive.method import Compressive
from taut.methods.memory.segment_recurrence.method import SegmentRecurrence
from taut.methods.memory.window_sink import WindowSink
from taut.training.carried_memory import CarriedMemory
from taut.training.corpus import read_corpus
from taut.training.run import train
from taut.training.spec import TrainSpec
from taut.training.token_rows import TokenRows, TrainingSet, spread, token_rows

MEMORY = {"memory": {"method": "segment_recurrence", "segment": 8, "memory": 8}}
METHODS = (
    SegmentRecurrence.parse({"segment": 4, "memory": 3}),
    SegmentRecurrence.parse({"segment": 5, "memory": 0}),
    WindowSink.parse({"sinks": 2, "window": 5}),
    Compressive.parse({"segment": 4, "memory": 3, "compressed": 2, "rate": 3}),
    Compressive.parse({"segment": 3, "memory": 2, "compressed": 3, "rate": 2, "pool": "conv"}),
    Compressive.parse({"segment": 4, "memory": 2, "compressed": 2, "rate": 2, "store": {"method": "low_bit"}}),
)
MOST_USED = Compressive.parse({"segment": 3, "memory": 4, "compressed": 3, "rate": 2, "pool": "most_used"})
NAMES = ("recurrence", "no memory", "sinks", "compressive", "convolution", "in 8 bits")


def carried_memory_of(method, layers: int = 2, positions: int | None = None) -> CarriedMemory:
    return CarriedMemory(lambda: method.cache(layers), 7, positions)


def teach(model) -> None:
    """Give what the memory learns other values than at first."""
    generator = torch.Generator().manual_seed(3)
    for weight in (parameter for name, parameter in model.named_parameters() if LEARNED in name.split(".")):
        weight.data.copy_(torch.randn(weight.shape, generator=generator) / 4)


def read(carried: CarriedMemory, model, ids: Tensor, restarts: Tensor, length: int) -> Tensor:
    """Logits of all pieces; ``restarts`` (B, pieces)."""
    outputs = []
    for piece, start in zip(restarts.T, range(0, ids.shape[1], length), strict=True):
        carried.begin()
        outputs.append(carried.read(model, ids[:, start : start + length], None, piece))
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("begins", [(0, 0), (0, 12), (0, 12, 24), (12, 12)], ids=str)
def test_a_stream_is_its_text_read_at_once(family: str, method, length: int, begins: tuple[int, ...]) -> None:
    """Row 0 begins a text at each of ``begins`` but the last, row 1 at 0 and at the last."""
    model = tiny(family, dtype=torch.float64)
    install(model, method)
    teach(model)
    ids = inputs(model, length=36)["input_ids"]
    texts = [sorted({0, *begins[:-1]}), sorted({0, begins[-1]})]
    restarts = torch.tensor([[start in own for start in range(0, 36, length)] for own in texts])
    with torch.no_grad():
        output = read(carried_memory_of(method), model, ids, restarts, length)
    for row, own in enumerate(texts):
        for start, stop in zip(own, [*own[1:], 36], strict=True):
            alone = logits(model, input_ids=ids[row : row + 1, start:stop], use_cache=False)
            assert (output[row, start:stop] - alone[0]).abs().max() <= 1e-12


@pytest.mark.parametrize("length", [3, 6])
def test_the_most_used_are_carried(length: int) -> None:
    """What a stream has counted goes on with it: a row is its text read alone in the same pieces."""
    model = tiny("llama", dtype=torch.float64)
    install(model, MOST_USED)
    ids = inputs(model, length=36)["input_ids"]
    restarts = torch.zeros(2, 36 // length, dtype=torch.bool)
    restarts[:, 0] = restarts[1, 12 // length] = True
    with torch.no_grad():
        output = read(carried_memory_of(MOST_USED), model, ids, restarts, length)
    for row, start, stop in ((0, 0, 36), (1, 0, 12), (1, 12, 36)):
        pieces = [length] * ((stop - start) // length)
        alone, _ = stepwise(model, pieces, input_ids=ids[row : row + 1, start:stop])
        assert (output[row, start:stop] - alone[0]).abs().max() <= 1e-12


def test_padding_at_the_end_of_a_text_is_not_remembered() -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, METHODS[0])
    ids = inputs(model, length=18)["input_ids"]
    carried = carried_memory_of(METHODS[0])
    masks = torch.ones(2, 18, dtype=torch.long)
    masks[1, 9:12] = 0
    output = []
    for start in (0, 6, 12):
        carried.begin()
        restarts = torch.tensor([start == 0, start in (0, 12)])
        with torch.no_grad():
            output.append(carried.read(model, ids[:, start : start + 6], masks[:, start : start + 6], restarts))
    output = torch.cat(output, 1)
    for row, start, stop in ((0, 0, 18), (1, 0, 9), (1, 12, 18)):
        alone = logits(model, input_ids=ids[row : row + 1, start:stop], use_cache=False)
        assert (output[row, start:stop] - alone[0]).abs().max() <= 1e-12


def test_what_is_carried_is_detached() -> None:
    model = tiny("llama", dtype=torch.float64)
    method = METHODS[0]
    install(model, method)
    ids, length = inputs(model, length=12)["input_ids"], 4
    direction = torch.randn(2, 12, model.config.vocab_size, generator=torch.Generator().manual_seed(1)).double()
    restarts = torch.tensor([[True, False, False]] * 2)

    def gradients() -> dict[str, Tensor]:
        copies = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        return copies

    carried = carried_memory_of(method)
    (read(carried, model, ids, restarts, length) * direction).sum().backward()
    layers = carried.pieces[0].cache.layers
    assert not any(layer.keys.requires_grad or layer.values.requires_grad for layer in layers)
    joined = gradients()
    (model(input_ids=ids, use_cache=False)["logits"] * direction).sum().backward()
    whole = gradients()
    assert max((joined[name] - whole[name]).abs().max() for name in whole) > 1e-2
    # The batches one by one, as training sees them: the same, for nothing reaches back.
    carried = carried_memory_of(method)
    for start in range(0, 12, length):
        carried.begin()
        piece = slice(start, start + length)
        (carried.read(model, ids[:, piece], None, restarts[:, start // length]) * direction[:, piece]).sum().backward()
    alone = gradients()
    assert all(torch.allclose(alone[name], joined[name], atol=1e-9, rtol=0) for name in alone)


def test_a_stream_restarts_before_positions_end() -> None:
    model = tiny("gpt2", dtype=torch.float64, n_positions=16)
    install(model, METHODS[0])
    ids = inputs(model, length=36)["input_ids"]
    restarts = torch.zeros(2, 6, dtype=torch.bool)
    restarts[:, 0] = restarts[1, 1] = True
    with torch.no_grad():
        output = read(carried_memory_of(METHODS[0], positions=16), model, ids, restarts, 6)
    for row, starts in enumerate(((0, 12, 24), (0, 6, 18, 30))):
        for start, stop in zip(starts, [*starts[1:], 36], strict=True):
            alone = logits(model, input_ids=ids[row : row + 1, start:stop], use_cache=False)
            assert (output[row, start:stop] - alone[0]).abs().max() <= 1e-12


@pytest.mark.parametrize("method", [*METHODS, MOST_USED], ids=[*NAMES, "most used"])
def test_a_saved_memory_goes_on(method) -> None:
    model = tiny("llama", dtype=torch.float64)
    install(model, method)
    ids = inputs(model, length=18)["input_ids"]
    restarts = torch.tensor([[True, False, False], [True, True, False]])
    with torch.no_grad():
        whole = read(carried_memory_of(method), model, ids, restarts, 6)
        first = carried_memory_of(method)
        read(first, model, ids[:, :12], restarts[:, :2], 6)
        second = carried_memory_of(method)
        second.load_state_dict(first.state_dict(), torch.device("cpu"))
        assert torch.equal(read(second, model, ids[:, 12:], restarts[:, 2:], 6), whole[:, 12:])


def test_rows_stand_in_the_order_of_the_text() -> None:
    rows = TokenRows(torch.arange(88).reshape(22, 4).int(), streams=3, first=torch.arange(22) % 9 == 0)
    stream = TrainingSet(rows, 24, 3, seed=5)
    ids = torch.stack([stream[index]["input_ids"] for index in range(24)]).reshape(8, 3, 4)
    restarts = torch.stack([stream[index]["restart"] for index in range(24)]).reshape(8, 3)
    # Seven rows in each of three streams, and then from the beginning.
    for number in range(3):
        assert torch.equal(ids[:7, number].flatten(), torch.arange(28) + 28 * number)
        assert torch.equal(ids[7, number], ids[0, number])
    assert restarts.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [2, 1], [4, 2], [7, 0], [7, 1], [7, 2]]
    # The last token of a row predicts the first of the next one, but not that of another text.
    assert stream[0]["labels"].tolist() == [1, 2, 3, 4]
    assert stream[4]["labels"].tolist() == [33, 34, 35, IGNORED]
    held = spread(rows, 24)
    assert held.ids[:, 0].tolist() == [0, 4, 28, 32, 56, 60]
    assert held.first.tolist() == [True, False] * 3
    assert spread(rows, 10**6).ids.shape == (21, 4)
    # Batches that come once more do not go on from those before them.
    again = TrainingSet(rows, 12, 3, 5, batch_of=lambda step: step % 2)
    assert [bool(again[index]["restart"]) for index in range(12)] == ([True] * 3 + [False] * 3) * 2


def test_documents_follow_each_other_or_begin_rows(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    texts = ["the " * 30, "one two", "a " * 8]
    packed = token_rows(texts, tokenizer, TrainSpec.load(small(tmp_path, carry_memory=True, recipe=MEMORY)), False)
    assert packed.first.sum() == 1
    assert packed.real is None
    apart = token_rows(
        texts, tokenizer, TrainSpec.load(small(tmp_path, carry_memory=True, pack=False, recipe=MEMORY)), False
    )
    starts = apart.first.nonzero().flatten().tolist()
    assert len(starts) == 3
    for start, stop, text in zip(starts, [*starts[1:], len(apart)], texts, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert apart.ids[start:stop][apart.real[start:stop]].tolist()[: len(ids)] == ids


@pytest.mark.parametrize("pack", [True, False])
def test_a_run_with_carried_memory_is_cut_off_and_goes_on(tmp_path: Path, pack: bool) -> None:
    spec = small(tmp_path, recipe=MEMORY, carry_memory=True, pack=pack, accumulate=2, save={"seconds": 0})
    whole = train(spec, tmp_path / "whole")
    for step in (3, 5):
        with pytest.raises(Cut):
            train(spec, tmp_path / "out", progress=cut_at(step))
    done = train(spec, tmp_path / "out")
    assert done.record["losses"] == whole.record["losses"]
    assert done.record["evaluations"] == whole.record["evaluations"]
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))
    assert not list((tmp_path / "out").glob("carried*"))
    # The stream is remembered: without memory, the same rows give other losses from the second step on.
    other = train(spec | {"recipe": {"memory": MEMORY["memory"] | {"segment": 1, "memory": 0}}}, tmp_path / "other")
    assert other.record["losses"][1] != whole.record["losses"][1]


def test_evaluation_reads_streams_in_order(tmp_path: Path) -> None:
    spec = TrainSpec.load(small(tmp_path, recipe=MEMORY, carry_memory=True, budget={"steps": 2}))
    done = train(spec, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = spread(token_rows(read_corpus(spec).held, tokenizer, spec, False), spec.evaluate.tokens)
    assert (rows.streams, rows.steps) == (4, 3)
    carried = rows.ids.reshape(rows.streams, -1).long()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        loss = model(input_ids=carried, labels=carried, use_cache=False).loss
        alone = model(input_ids=rows.ids.long(), labels=rows.ids.long(), use_cache=False).loss
    assert done.record["evaluations"][-1]["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert abs(float(alone - loss)) > 1e-4


def test_carrying_without_a_memory_is_refused(tmp_path: Path) -> None:
    for recipe in ({}, {"feedforward": {"method": "low_rank", "keep": 0.5}}, {"memory": "identity"}):
        with pytest.raises(TautError, match=r"give the recipe a bounded memory, such as memory: \{method: segment"):
            train(small(tmp_path, carry_memory=True, recipe=recipe, model=LLAMA), tmp_path / "out")


def test_learned_positions_bound_a_stream(tmp_path: Path) -> None:
    model = "gpt2:n_embd=32,n_layer=2,n_head=4,n_positions=40"
    recipe = {"memory": {"method": "window_sink", "sinks": 2, "window": 60}}
    done = train(small(tmp_path, model=model, recipe=recipe, carry_memory=True, budget={"steps": 4}), tmp_path / "out")
    # Rows of 16: a third one would go beyond 40 positions, so two see 40 keys at most and the next one restarts.
    plain = train(small(tmp_path, model=model.replace("40", "64"), budget={"steps": 4}), tmp_path / "plain")
    scores = 3 * 2 * 4 * 32
    costs = [run.record["flops_per_token"]["model"] for run in (done, plain)]
    assert costs[0] - costs[1] == scores * (40 - 16)
    assert done.record["losses"][0] == pytest.approx(plain.record["losses"][0], rel=0.1)


@pytest.mark.full
def test_two_processes_read_the_same_streams(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    content = small(tmp_path, recipe=MEMORY, carry_memory=True, pack=False, save={"steps": 3})
    spec.write_text(json.dumps(content))
    launch = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29619", "-m", "taut", "train")
    command = [sys.executable, *launch, str(spec), "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two" / "training.json").read_text())
    one = train(spec, tmp_path / "one").record
    assert two["processes"] == 2
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-5)
    losses, expected = ([entry["loss"] for entry in record["evaluations"]] for record in (two, one))
    assert losses == pytest.approx(expected, abs=1e-5)
