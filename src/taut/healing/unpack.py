"""Unpack the parts of a compressed model for training, and repack them afterwards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from taut.architectures.locate import locate
from taut.core.errors import TautError
from taut.core.site import LinearSite
from taut.healing.adapters import adapted
from taut.methods.base import PartMethod
from taut.methods.part import Part
from taut.surgery.align import align_tensors
from taut.surgery.apply import surgery_of

UNPACKED = "_unpacked"
"""The ending of the names of parameters that ``repack`` will round."""
ROUNDED = 0.1
"""The factor on the step sizes of such parameters. Rounding hides small changes from the loss, and what it hides
becomes noise. Chosen by experiments on tables in 2 bits and on factors of low rank."""
LEAST = 1e-3
"""The least root mean square that a step size is based on, for tensors of zeros."""


class Snapshot:
    """A copy of the tensors of some modules, to restore them later."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._states = [
            (module, {name: tensor.clone() for name, tensor in module.state_dict().items()}) for module in modules
        ]

    def put_back(self) -> None:
        for module, state in self._states:
            module.load_state_dict(state)


def originals(model: PreTrainedModel, original: PreTrainedModel) -> Iterator[tuple[Part, Tensor]]:
    """Yield every part with tensors, and the original's dense weight: (V, D) of a table, (outputs, inputs) of a map.

    One after the other, because an original that stays on disk may be larger than memory.
    """
    for step in surgery_of(model).steps:
        if isinstance(step.method, PartMethod):
            module = original.get_submodule(step.site.path)
            with align_module_device(module):
                weight = module.merged() if isinstance(module, Part) else module.weight.detach()
                transposed = isinstance(step.site, LinearSite) and step.site.transposed
                yield model.get_submodule(step.site.path), weight.t() if transposed else weight


def learners(model: PreTrainedModel, original: PreTrainedModel, which: str) -> list[nn.Module]:
    """The modules that may change: the parts, alone or with the norms or the maps left dense; or the whole model."""
    if which in ("body", "all"):
        return [model]
    kept = set(_left_dense(model, original)) if which == "adapters" else set()
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, Part) or path in kept or (which == "norms" and type(module).__name__.endswith("Norm"))
    ]


@contextmanager
def unpacked(
    model: PreTrainedModel, original: PreTrainedModel, which: str = "parts", rank: int = 8, seed: int = 0
) -> Iterator[dict[nn.Parameter, float]]:
    """Unpack the parts and yield the parameters to train, float32, each with its step size. All others are frozen.

    The step size is the root mean square of the tensor times the relative error ||E' - E|| / ||E||, at most 1. E' is
    the dense equivalent of its part and E the original's weight. Outside of parts, the error is the mean over the
    tensors of parts. Parameters that will be rounded have smaller steps (``ROUNDED``). ``rank`` and ``seed`` are those
    of adapters.

    Afterwards the parts are repacked, and dtypes and ``requires_grad`` are as before; after a failure the values too.
    Raises TautError if nothing can be trained.
    """
    parts = [module for module in model.modules() if isinstance(module, Part)]
    modules = learners(model, original, which)
    before, marks = Snapshot(modules), _Marks(model, parts)
    start: list[tuple[nn.Parameter, Tensor]] = []
    try:
        model.float().eval().requires_grad_(False)
        errors = {}
        for part, weight in originals(model, original):
            error = _relative_error(part, weight)
            part.unpack(weight)
            for name, tensor in part.named_parameters():
                errors[tensor] = error * (ROUNDED if name.endswith(UNPACKED) else 1.0)
        mean = sum(errors.values()) / max(1, len(errors))
        dense = _left_dense(model, original) if which == "adapters" else []
        with adapted(model, dense, rank, seed) if which == "adapters" else nullcontext({}) as sizes:
            # PEFT has just frozen everything but its own tensors.
            _allow(model, modules, which)
            learning = [tensor for tensor in model.parameters() if tensor.requires_grad]
            start = [(tensor, tensor.detach().clone()) for tensor in learning]
            if not start:
                names = ", ".join(dict.fromkeys(type(part).__name__ for part in parts)) or "no part with tensors"
                raise TautError(f"heal: nothing here can learn ({names}); use train: norms or all")
            yield {tensor: sizes.get(tensor, _size(tensor)) * errors.get(tensor, mean) for tensor in learning}
    except BaseException:
        # After a loss has diverged, values may not be storable. They must not reach ``repack``.
        with torch.no_grad():
            for tensor, value in start:
                tensor.copy_(value)
        marks.put_back()
        before.put_back()
        raise
    marks.put_back()


def _allow(model: PreTrainedModel, modules: Sequence[nn.Module], which: str) -> None:
    """Enable gradients for what is trained."""
    for module in modules:
        if which != "adapters" or isinstance(module, Part):
            module.requires_grad_(True)
    table = model.get_input_embeddings()
    if which == "body" and not isinstance(table, Part):
        # This freezes a tied head too, because it is the same tensor.
        table.requires_grad_(False)


def _left_dense(model: PreTrainedModel, original: PreTrainedModel) -> list[str]:
    """The paths of the linear maps in the blocks that no part replaces, as located in the original."""
    taken = {step.site.path for step in surgery_of(model).steps}
    return [site.path for site in locate(original).sites if isinstance(site, LinearSite) and site.path not in taken]


def _size(tensor: Tensor) -> float:
    """The root mean square. A tensor of zeros, such as a new bias, counts as small, so that it can be trained."""
    return max(float(tensor.detach().float().square().mean().sqrt()), LEAST)


class _Marks:
    """Dtypes and ``requires_grad`` of all tensors of a model, to restore them later.

    Not all tensors of a half-precision model are half: rotary frequencies, for example, would lose precision.
    """

    def __init__(self, model: PreTrainedModel, parts: Sequence[Part]) -> None:
        self.model, self.parts = model, [(part, part.dtype) for part in parts]
        self.tensors = {name: (tensor.dtype, tensor.requires_grad) for name, tensor in _tensors(model)}

    def put_back(self) -> None:
        for part, dtype in self.parts:
            part.repack()
            part.to(dtype)
        for name, tensor in _tensors(self.model):
            dtype, learned = self.tensors[name]
            tensor.data = tensor.data.to(dtype)
            tensor.grad = None
            tensor.requires_grad_(learned)
        align_tensors(self.model)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


@torch.no_grad()
def _relative_error(part: Part, weight: Tensor) -> float:
    weight = weight.float()
    size = weight.norm().clamp_min(torch.finfo(weight.dtype).tiny)
    return float(((part.merged().float() - weight).norm() / size).clamp(max=1.0))
