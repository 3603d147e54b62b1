"""The shape guard: a compressed checkpoint raises an error when it is opened without taut.

Transformers only warns about an unknown quantizer and then starts with random weights. But it raises an error when a
tensor has another shape. Parts with tensors of their own differ in shape already. If a site keeps its original tensors
(identity, attention, memory), one of its matrices is written with an axis of length one in the middle, (N, 1, M).
Loading restores its shape. The first axis stays, because transformers pads a tied head's bias to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taut.methods.base import PartMethod
from taut.methods.part import Part
from taut.surgery.plan import Step


def guarded_names(model: PreTrainedModel, steps: tuple[Step, ...]) -> tuple[str, ...]:
    """Return the names of the tensors to guard, one for each site without a part.

    It is the site's first matrix that no part owns and that is stored under its own name (not tied to another). The
    names follow from the plan and the model alone, so saving and loading agree.
    """
    owned = {f"{name}." for name, module in model.named_modules() if isinstance(module, Part)}
    names: list[str] = []
    for step in steps:
        if isinstance(step.method, PartMethod):
            continue
        lead = f"{step.site.path}." if step.site.path else ""
        for name, tensor in model.get_submodule(step.site.path).named_parameters():
            full = lead + name
            free = full not in names and full not in model.all_tied_weights_keys
            if tensor.dim() > 1 and free and not any(full.startswith(prefix) for prefix in owned):
                names.append(full)
                break
    return tuple(names)


def guard_skeleton(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Give the skeleton's guarded parameters the shape that they have in the file."""
    for name in names:
        _reshape(model, name, torch.unsqueeze)


def restore_shapes(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Restore the shape of loaded parameters, ties included."""
    for name in names:
        _reshape(model, name, torch.squeeze)


def guard_state(state: dict[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the state dict to write: guarded tensors, and all that are tied to them, get the extra axis (views)."""
    pointers = {state[name].data_ptr() for name in names}
    return {
        name: tensor.unsqueeze(1) if tensor.dim() > 1 and tensor.data_ptr() in pointers else tensor
        for name, tensor in state.items()
    }


def restore_state_shapes(
    steps: tuple[Step, ...], model: PreTrainedModel, state: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Restore the shape of guarded tensors from a file. Torch calls this before ``load_state_dict``, as when Trainer
    resumes."""
    guarded = {id(model.get_parameter(name)) for name in guarded_names(model, steps)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tensor = state.get(prefix + name)
        if tensor is not None and id(parameter) in guarded and tensor.dim() == parameter.dim() + 1:
            state[prefix + name] = tensor.squeeze(1)


def _reshape(model: PreTrainedModel, name: str, change: Callable[[Tensor, int], Tensor]) -> None:
    """Reshape a parameter everywhere it is registered, so that ties keep sharing one tensor."""
    old = model.get_parameter(name)
    new = nn.Parameter(change(old.detach(), 1), old.requires_grad)
    for module in model.modules():
        for attribute, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter is old:
                setattr(module, attribute, new)
