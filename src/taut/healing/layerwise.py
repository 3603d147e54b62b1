"""Healing one block after the other: each is trained to give the output of the original's block.

Its input is the output of the healed blocks before it. The original may stay on disk, with one block at a time in
memory.

Block-wise distillation as in Li et al. 2021, BRECQ (arXiv 2102.05426). Changed: the loss is the relative error of the
block's output, and a block's target comes from the original's own input rather than from the student's.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from taut.architectures.locate import locate
from taut.core.errors import TautError
from taut.healing.distil import Distillation, real_tokens
from taut.healing.losses import relative_error
from taut.healing.settings import Healing
from taut.healing.trainer import Progress, optimizer, train

CACHES = ("past_key_values", "past_key_value", "use_cache", "cache_position")


class LayerBlock:
    """The loss of one block of a student against its targets, for Distillation.

    Every batch has ``inputs`` and ``targets`` (B, T, D) of the block, its other arguments in ``calls``, and ``real``
    (B, T) bool.
    """

    def __init__(
        self,
        student: nn.Module,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        calls: Sequence[partial],
        real: Sequence[Tensor],
    ) -> None:
        self.student, self.inputs, self.targets, self.calls, self.real = student, inputs, targets, calls, real

    def loss(self, index: int) -> Tensor:
        """The loss of one batch, float32 scalar."""
        output, real = self.calls[index](self.student, self.inputs[index]), self.real[index]
        return relative_error(output[real].float(), self.targets[index][real].float())


def heal_by_layer(
    model: PreTrainedModel,
    original: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    trained: Mapping[nn.Parameter, float],
    choices: Healing,
    folder: Path,
    seconds: float = 30.0,
    progress: Progress | None = None,
) -> None:
    """Train the tensors ``trained``, with their step sizes, in each block for ``choices.steps`` steps, in place.

    Holds the hidden states of at most that many batches, twice. Finished blocks are kept in ``folder``, from which an
    interrupted run continues. Raises TautError for a model with two stacks, and if no block has anything to train.
    """
    paths = blocks_of(original)
    learning = [{p: trained[p] for p in model.get_submodule(path).parameters() if p in trained} for path in paths]
    total = sum(map(bool, learning)) * choices.steps
    if not total:
        raise TautError("heal: by = layer, but no block holds anything that learns; use by=model")
    batches = batches[: choices.steps]
    real = [real_tokens(batch)[0].to(model.device) for batch in batches]
    inputs, calls = _enter(model, paths, batches)
    theirs, _ = _enter(original, paths[:1], batches)
    before = 0
    for number, (path, group) in enumerate(zip(paths, learning, strict=True)):
        block = model.get_submodule(path)
        targets = _through(original.get_submodule(path), theirs, calls[number])
        if group:
            finished = folder / f"layer-{number}.safetensors"
            if finished.is_file():
                _fill(group, load_file(finished))
            else:
                task = Distillation(
                    LayerBlock(block, inputs, targets, calls[number], real), group, range(len(batches)), choices.seed
                )
                seen = None if progress is None else partial(_report, progress, before, total)
                train(task, optimizer(group, choices.learning_rate), choices, folder / f"layer-{number}", seconds, seen)
                _keep(group, finished)
            before += choices.steps
        inputs, theirs = _through(block, inputs, calls[number]), targets


def blocks_of(original: PreTrainedModel) -> tuple[str, ...]:
    """The paths of the blocks, first to last. Raises TautError for a model with an encoder and a decoder."""
    stacks = locate(original).blocks
    if len(stacks) > 1:
        raise TautError(f"heal: by = layer is for models with one stack of layers; this one has {' and '.join(stacks)}")
    return next(iter(stacks.values()))


@torch.no_grad()
def _enter(
    model: PreTrainedModel, paths: Sequence[str], batches: Sequence[dict[str, Tensor]]
) -> tuple[list[Tensor], list[list[partial]]]:
    """The input of the first block for every batch, and the other arguments of each block for every batch."""
    inputs: list[Tensor] = []
    calls: list[list[partial]] = [[] for _ in paths]

    def note(number: int, block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = {name: None if name in CACHES else value for name, value in named.items()}
        state = named.pop("hidden_states") if "hidden_states" in named else arguments[0]
        if number == 0:
            inputs.append(state)
        calls[number].append(partial(_call, arguments[1:], named))

    hooks = [
        model.get_submodule(path).register_forward_pre_hook(partial(note, number), with_kwargs=True)
        for number, path in enumerate(paths)
    ]
    try:
        for batch in batches:
            model(**{name: tensor.to(_device(model)) for name, tensor in batch.items() if name != "labels"})
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, calls


def _device(model: PreTrainedModel) -> torch.device:
    """The device of a model's inputs. A model that stays on disk computes on the CPU."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _call(arguments: tuple[Any, ...], named: dict[str, Any], block: nn.Module, state: Tensor) -> Tensor:
    output = block(state, *arguments, **named)
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def _through(block: nn.Module, inputs: Sequence[Tensor], calls: Sequence[partial]) -> list[Tensor]:
    return [call(block, state) for call, state in zip(calls, inputs, strict=True)]


def _report(progress: Progress, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _keep(learned: Mapping[nn.Parameter, float], path: Path) -> None:
    """Write the file completely or not at all."""
    partial_file = path.with_suffix(".part")
    save_file({str(number): tensor.detach().contiguous() for number, tensor in enumerate(learned)}, partial_file)
    partial_file.replace(path)


@torch.no_grad()
def _fill(learned: Mapping[nn.Parameter, float], kept: Mapping[str, Tensor]) -> None:
    for number, tensor in enumerate(learned):
        tensor.copy_(kept[str(number)])
