"""A tightened model made ready to learn, and put back."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from taut.core.errors import TautError
from taut.core.site import LinearSite
from taut.methods.part import Part, PartMethod
from taut.surgery.align import align_tensors
from taut.surgery.apply import surgery_of

LOOSE = "_loose"
"""How a part names what it will round."""
ROUNDED = 0.1
"""How much shorter the steps of such numbers are: rounding hides movements from the loss, and what it hides becomes
noise. Found by trying on tables in 2 bits and on factors of low rank."""


class Snapshot:
    """The tensors of some modules as they are now, to be put back."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._states = [
            (module, {name: tensor.clone() for name, tensor in module.state_dict().items()}) for module in modules
        ]

    def put_back(self) -> None:
        for module, state in self._states:
            module.load_state_dict(state)


def originals(model: PreTrainedModel, original: PreTrainedModel) -> list[tuple[Part, Tensor]]:
    """Every part with tensors, and the original's dense weight there: (V, D) of a table, (outputs, inputs) of a map."""
    found = []
    for step in surgery_of(model).steps:
        if isinstance(step.method, PartMethod):
            module = original.get_submodule(step.site.path)
            weight = module.merged() if isinstance(module, Part) else module.weight.detach()
            transposed = isinstance(step.site, LinearSite) and step.site.transposed
            found.append((model.get_submodule(step.site.path), weight.t() if transposed else weight))
    return found


def learners(model: PreTrainedModel, which: str) -> list[nn.Module]:
    """The modules that may learn: ``parts``, those and the ``norms``, or ``all``."""
    if which == "all":
        return [model]
    return [
        module
        for module in model.modules()
        if isinstance(module, Part) or (which == "norms" and type(module).__name__.endswith("Norm"))
    ]


@contextmanager
def loosened(
    model: PreTrainedModel, original: PreTrainedModel, which: str = "parts"
) -> Iterator[dict[nn.Parameter, float]]:
    """The parameters that may learn, float32, each with how far it has to go; everything else is frozen.

    That is the relative error ||E' - E|| / ||E||, at most 1, of what its part stands for against the original's weight;
    outside of parts the mean of theirs. Numbers that are rounded on the way count for a part of it (``ROUNDED``).
    Afterwards the parts are tight, and dtypes and ``requires_grad`` as before; after a failure the values too. Raises
    TautError when nothing can learn.
    """
    parts = originals(model, original)
    modules = learners(model, which)
    before, marks = Snapshot(modules), _Marks(model, [part for part, _ in parts])
    start: list[tuple[nn.Parameter, Tensor]] = []
    try:
        model.float().eval().requires_grad_(False)
        errors = {}
        for part, weight in parts:
            error = _relative_error(part, weight)
            part.loosen(weight)
            for name, tensor in part.named_parameters():
                errors[tensor] = error * (ROUNDED if name.endswith(LOOSE) else 1.0)
        for module in modules:
            module.requires_grad_(True)
        start = [(tensor, tensor.detach().clone()) for tensor in model.parameters() if tensor.requires_grad]
        if not start:
            names = ", ".join(dict.fromkeys(type(part).__name__ for part, _ in parts)) or "no part with tensors"
            raise TautError(f"heal: nothing here can learn ({names}); use train: norms or all")
        mean = sum(errors.values()) / max(1, len(errors))
        yield {tensor: errors.get(tensor, mean) for tensor, _ in start}
    except BaseException:
        # What cannot be stored (a loss that ran away) must not reach ``tighten``.
        with torch.no_grad():
            for tensor, value in start:
                tensor.copy_(value)
        marks.put_back()
        before.put_back()
        raise
    marks.put_back()


class _Marks:
    """Dtypes and ``requires_grad`` of a model, to be put back. Not all tensors of a half-precision model are half: its
    rotary frequencies, for one, would suffer from a round trip."""

    def __init__(self, model: PreTrainedModel, parts: Sequence[Part]) -> None:
        self.model, self.parts = model, [(part, part.dtype) for part in parts]
        self.tensors = {name: (tensor.dtype, tensor.requires_grad) for name, tensor in _tensors(model)}

    def put_back(self) -> None:
        for part, dtype in self.parts:
            part.tighten()
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
