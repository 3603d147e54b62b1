"""The checks, each a function of a case. A failed assertion breaks the contract.

Every check names what it needs of a case, so whether it applies is known before anything runs.
"""

import copy
import itertools
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from taut.contract.case import Case
from taut.contract.conditions import (
    Check,
    has_a_dial,
    has_parts,
    is_counted,
    is_decoder,
    named,
    plans_by_keep,
    steps_agree,
)
from taut.contract.tiny import inputs, logits, padded_inputs, stepwise
from taut.contract.workers import Worker, bits_equal
from taut.core.errors import TautError
from taut.core.recipe import Recipe
from taut.core.site import LinearSite, TableSite
from taut.healing.distil import Comparison
from taut.healing.trainer import optimizer
from taut.healing.unpack import unpacked
from taut.methods.base import LEARNED, PartMethod
from taut.methods.part import LinearPart, Part, TablePart
from taut.surgery.apply import apply, undo
from taut.surgery.export import densify
from taut.surgery.plan import make_plan

COMPANIONS = {
    "embedding": {"method": "low_bit", "bits": 8},
    "projection": {"method": "low_rank", "rank": 8},
    "feedforward": {"method": "low_bit"},
    "attention": {"method": "local_global", "window": 6},
    "memory": {"method": "window_sink", "sinks": 2, "window": 6},
}


def shape_and_dtype(case: Case) -> None:
    """The output is finite, with the shape and dtype of the original's output, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        original, model = case.model(dtype), case.compressed(dtype)
        before, after = case.answer(original), case.answer(model)
        assert (after.shape, after.dtype) == (before.shape, before.dtype)
        assert after.isfinite().all()


def predicted_is_counted(case: Case) -> None:
    """Predicted bytes are exactly those of the part's tensors, and predicted parameters exactly its numbers."""
    for step in (model := case.compressed()).hf_quantizer.surgery.steps:
        part, dense = model.get_submodule(step.site.path), step.site.dense()
        if not isinstance(step.method, PartMethod):
            if dense.bytes:  # an identity
                continue
            part = dict(part.named_children()).get(LEARNED, torch.nn.Module())
        tensors = part.state_dict().values()
        numbers = part.numbers() if dense.bytes else sum(tensor.numel() for tensor in tensors)
        assert step.cost.bytes == sum(tensor.nbytes for tensor in tensors), step.site.name
        assert step.cost.parameters == numbers <= (dense.parameters or numbers), step.site.name


def flops_are_counted(case: Case) -> None:
    """Predicted FLOPs are within 2 % of PyTorch's counter, unless the method says why it cannot count them."""
    model = case.compressed()
    for step in model.hf_quantizer.surgery.steps:
        if not isinstance(step.method, PartMethod):
            continue
        part = model.get_submodule(step.site.path)
        tokens, there = 16, {"device": model.device}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            if isinstance(part, TablePart):
                part(torch.arange(tokens, **there))
                for _ in step.site.heads:
                    part.logits(torch.randn(tokens, step.site.width, **there))
            else:
                part(torch.randn(tokens, step.site.inputs, **there))
        counted = counter.get_total_flops() / tokens
        assert abs(step.cost.flops_per_token - counted) <= 0.02 * counted + 1e-9, (step.site.name, counted)


def cost_is_monotone(case: Case) -> None:
    """A smaller ``keep`` never costs more of anything, and parts never need more bytes than the dense weights."""
    for plan in plans_by_keep(case):
        assert plan.after.bytes <= plan.before.bytes or not isinstance(plan.steps[0].method, PartMethod)
    costs = [plan.after for plan in plans_by_keep(case)]
    for less, more in itertools.pairwise(costs):
        assert all(vars(less)[name] <= vars(more)[name] for name in vars(less)), (less, more)


def gradients_flow(case: Case) -> None:
    """A finite gradient reaches every trainable parameter, and every part of a trainable model is trainable."""
    model = case.compressed().train()
    for module in model.modules():
        if isinstance(module, Part):
            assert all(parameter.requires_grad for parameter in module.parameters())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    output = model(**inputs(model))
    answer = output["logits"] if "logits" in output else output["last_hidden_state"]
    direction = torch.randn(answer.shape, generator=torch.Generator().manual_seed(0))
    (answer * direction.to(answer.device)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.numel() and not name.endswith("position_bias"):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


def future_does_not_leak(case: Case) -> None:
    """Changing a token leaves the outputs at all earlier positions unchanged, to the bit."""
    model = case.compressed()
    batch = inputs(model, length=14)
    key = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed[key][:, 9] = (changed[key][:, 9] + 7) % 90 + 5
    before, after = logits(model, **batch), logits(model, **changed)
    assert bits_equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


def padding_does_not_leak(case: Case) -> None:
    """The tokens in the padding do not matter, and a padded row gives the same output as the row alone."""
    model = case.compressed(torch.float32)
    batch = padded_inputs(model, length=14)
    other = {name: tensor.clone() for name, tensor in batch.items()}
    padding = batch["attention_mask"] == 0
    other["input_ids"][padding] = 50
    if not model.config.is_encoder_decoder and case.decoder:
        positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        batch["position_ids"] = other["position_ids"] = positions
    before, after = logits(model, **batch), logits(model, **other)
    real = torch.ones(before.shape[:2], dtype=torch.bool, device=before.device)
    if not model.config.is_encoder_decoder:
        real = ~padding
    assert torch.allclose(before[real], after[real], atol=2e-5, rtol=0)
    keep = batch["attention_mask"][-1].bool()
    alone = {name: tensor[-1:] for name, tensor in batch.items()}
    alone["input_ids"] = alone["input_ids"][:, keep]
    alone["attention_mask"] = alone["attention_mask"][:, keep]
    if "position_ids" in alone:
        alone["position_ids"] = alone["position_ids"][:, keep]
    single = logits(model, **alone)[0]
    assert_close(model, before[-1][real[-1]], single, atol=5e-4)


def steps_equal_full_pass(case: Case) -> None:
    """Decoding token by token through the cache gives the same output as one pass over the whole text."""
    model = case.compressed()
    batch = inputs(model, length=14)
    whole = logits(model, **batch, use_cache=False)
    steps, _ = stepwise(model, [4, *[1] * 10], **batch)
    assert_close(model, steps, whole, atol=1e-4)


def undo_to_the_bit(case: Case) -> None:
    """After undo the model equals the original: same tensors, output and ties, and no trace in the config."""
    original, model = case.model(), case.compressed()
    undo(model)
    assert "quantization_config" not in model.config.to_dict()
    before, after = original.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(bits_equal(before[name], after[name]) for name in before)
    assert bits_equal(case.answer(original), case.answer(model))
    assert original.all_tied_weights_keys == model.all_tied_weights_keys
    assert original.config._attn_implementation == model.config._attn_implementation


def same_seed_same_bits(case: Case) -> None:
    """Compressing twice gives the same tensors and the same output, to the bit."""
    first, second = case.compressed(), case.compressed()
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    assert all(bits_equal(a[name], b[name]) for name in a)
    assert bits_equal(case.answer(first), case.answer(second))


def reloads_to_the_bit(case: Case, worker: Worker) -> None:
    """Another process opens a saved model: same output to the bit, and same file when saved again."""
    model = case.compressed()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model.save_pretrained(path)
        batch = inputs(model)
        save_file(batch, f"{folder}/inputs")
        reply = worker.open(path, Path(folder) / "inputs", type(model).__name__, Path(folder) / "again")
        assert reply["opened"], reply.get("error")
        assert bits_equal(reply["answer"], case.answer(model))
        first = (path / "model.safetensors").read_bytes()
        assert first == (Path(folder) / "again" / "model.safetensors").read_bytes()


def loud_without_taut(case: Case, worker: Worker) -> None:
    """Opened without taut, a folder raises an error about sizes instead of starting with random weights."""
    model = case.compressed()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        model.save_pretrained(path)
        save_file(inputs(model), f"{folder}/inputs")
        reply = worker.open(path, Path(folder) / "inputs", type(model).__name__)
        assert not reply["opened"]
        assert "size" in reply["error"].lower() or "shape" in reply["error"].lower(), reply["error"]


def casting_keeps_codes(case: Case) -> None:
    """A cast to bfloat16, half or float changes all float tensors, but no integer ones. The output stays finite."""
    model = case.compressed()
    codes = {name: tensor.clone() for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    for cast in (lambda: model.to(torch.bfloat16), lambda: model.half(), lambda: model.float()):
        cast()
        state = model.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in codes.items())
        assert len({tensor.dtype for tensor in state.values() if tensor.is_floating_point()}) == 1
    assert case.answer(model).isfinite().all()
    assert case.answer(model.to(torch.bfloat16)).dtype == torch.bfloat16


def merged_is_equivalent(case: Case) -> None:
    """The dense equivalent of every part computes what the part computes, and the exported model agrees."""
    model = case.compressed()
    parts = {name: module for name, module in model.named_modules() if isinstance(module, Part)}
    tolerance, seen = _approximate(model) or 1e-4, _inputs_of_maps(case, model)
    for name, part in parts.items():
        merged = part.merged()
        if isinstance(part, TablePart):
            ids = torch.arange(part.num_embeddings, device=model.device)
            assert torch.allclose(part(ids), merged * part.scale, atol=1e-5), name
            hidden = torch.randn(5, part.embedding_dim, device=model.device)
            assert torch.allclose(part.logits(hidden), hidden @ merged.t(), atol=1e-3, rtol=1e-3), name
        elif isinstance(part, LinearPart):
            x = seen[name]
            dense = torch.nn.functional.linear(x, merged, part.bias)
            assert (part(x) - dense).norm() <= tolerance * dense.norm(), name
    dense, _ = densify(model)
    gap = (case.answer(dense) - case.answer(model)).norm() / case.answer(model).norm()
    assert gap <= (max(0.2, 2 * _approximate(model)) if _approximate(model) else 1e-3)


def builds_from_scratch(case: Case) -> None:
    """A part built from shapes alone, without any trained weight, gives a finite output."""
    model = case.model()
    for step in case.steps:
        if isinstance(step.method, PartMethod):
            torch.manual_seed(0)
            part = step.method.build(step.site, model.device, torch.float32)
            if isinstance(step.site, TableSite):
                assert part(torch.arange(4, device=model.device)).isfinite().all()
            elif isinstance(step.site, LinearSite):
                assert part(torch.randn(2, step.site.inputs, device=model.device)).isfinite().all()


def copies_deeply(case: Case) -> None:
    """copy.deepcopy of a compressed model is independent and gives the same output."""
    model = case.compressed()
    before = case.answer(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert bits_equal(case.answer(twin), before)


def heals(case: Case) -> None:
    """Healing works, from unpacking to repacking.

    Unpacked parts compute what they will store. A finite gradient reaches every trainable number. Six steps towards the
    original's outputs do no harm. Afterwards the tensors have the same names, shapes and dtypes.
    """
    model, original = case.compressed(), case.model()
    before, answer = model.state_dict(), case.answer(model)
    batches = case.batches(original)
    comparison = Comparison(model, original, batches, "hidden")
    first = comparison.mean(range(len(batches)))
    with unpacked(model, original) as trained:
        room = max(1e-3, _approximate(model))
        assert (case.answer(model) - answer).norm() <= room * answer.norm(), "unpacked and packed outputs differ"
        adam = optimizer(trained, 0.01)
        for _ in range(6):
            adam.zero_grad()
            sum(comparison.loss(index) for index in range(len(batches))).backward()
            assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained)
            adam.step()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all((after[name].shape, after[name].dtype) == (before[name].shape, before[name].dtype) for name in after)
    # If activations are rounded, most of the remaining loss is that rounding, which changes with every step.
    room = 1.25 if _approximate(model) else 1.02
    assert comparison.mean(range(len(batches))) <= room * first + 1e-9, "six steps towards the original did harm"


def composes(case: Case) -> None:
    """The method works, and reloads to the bit, together with a real method in every other slot of this family."""
    model = case.model()
    content = dict(case.recipe().to_dict())
    for slot, line in COMPANIONS.items():
        if slot not in content:
            try:
                make_plan(model, Recipe.parse({slot: line}))
            except TautError:
                continue
            content[slot] = line
    apply(model, Recipe.parse(content), case.batches(model))
    answer = case.answer(model)
    assert answer.isfinite().all()
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert bits_equal(case.answer(type(model).from_pretrained(folder).to(case.device).eval()), answer)


def _inputs_of_maps(case: Case, model: PreTrainedModel) -> dict[str, Tensor]:
    """Collect the inputs of every linear part, (tokens, inputs) by name: calibrated parts may expect such inputs."""
    seen: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, LinearPart):
                keep = partial(lambda name, _, args: seen.update({name: args[0].detach().flatten(0, -2)}), name)
                stack.enter_context(module.register_forward_pre_hook(keep))
        case.answer(model)
    return seen


def _approximate(model: PreTrainedModel) -> float:
    """Return the relative error that rounded activations may cause, 0 if none are rounded.

    With rounding, the last bit of a float may change a code, so results agree only within a tolerance.
    """
    steps = model.hf_quantizer.surgery.steps
    return max((float(step.method.approximate) for step in steps), default=0.0)


def assert_close(model: PreTrainedModel, a: Tensor, b: Tensor, atol: float) -> None:
    """Assert that two outputs of a model are equal up to rounding, within the tolerance of its methods or ``atol``."""
    if _approximate(model):
        assert (a - b).norm() <= _approximate(model) * b.norm()
    else:
        assert torch.allclose(a, b, atol=atol, rtol=1e-4)


CHECKS = named(
    Check(shape_and_dtype),
    Check(predicted_is_counted),
    Check(flops_are_counted, (has_parts, is_counted)),
    Check(cost_is_monotone, (has_a_dial,)),
    Check(gradients_flow),
    Check(future_does_not_leak, (is_decoder,)),
    Check(padding_does_not_leak),
    Check(steps_equal_full_pass, (is_decoder, steps_agree)),
    Check(undo_to_the_bit),
    Check(same_seed_same_bits),
    Check(casting_keeps_codes),
    Check(merged_is_equivalent, (has_parts,)),
    Check(builds_from_scratch, (has_parts,)),
    Check(copies_deeply),
    Check(heals, (has_parts,)),
    Check(composes),
)
PROCESS_CHECKS = named(Check(reloads_to_the_bit, with_taut=True), Check(loud_without_taut, with_taut=False))
