"""Installs parts in a model, and removes them again to the bit."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from taut.core.errors import TautError
from taut.core.site import AttentionSite, LinearSite, MemorySite, TableSite
from taut.methods.base import LEARNED, AttentionMethod, MemoryMethod, PartMethod
from taut.methods.part import LinearPart, Part, TablePart
from taut.surgery.attention import install_attention
from taut.surgery.cache_hook import install_memory
from taut.surgery.plan import Step
from taut.surgery.positions import NoPositions, taken_out, unturned
from taut.surgery.shape_guard import restore_state_shapes

Build = Callable[[Step, nn.Module], nn.Module | None]
"""Makes a module from the one at a site: its replacement, or for attention and memory a child module or None."""


class SharedTable(nn.Module):
    """A second lookup of a table that another module holds (T5's two stacks). It holds no tensors of its own."""

    def __init__(self, part: TablePart) -> None:
        super().__init__()
        # Torch must not register the part: otherwise its tensors would appear in the state dict twice.
        object.__setattr__(self, "part", part)
        self.num_embeddings, self.embedding_dim = part.num_embeddings, part.embedding_dim

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids -> (..., D)."""
        return self.part(ids)


class SharedHead(nn.Module):
    """An output map tied to a table: logits from the table's own factors or codes, plus the head's own bias."""

    def __init__(self, part: TablePart, bias: nn.Parameter | None) -> None:
        super().__init__()
        object.__setattr__(self, "part", part)
        self.in_features, self.out_features = part.embedding_dim, part.num_embeddings
        self.bias = bias

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V)."""
        logits = self.part.logits(hidden)
        return logits if self.bias is None else logits + self.bias


class Surgery:
    """The changes made to one model.

    ``undo`` restores the original modules, ties and attributes to the bit, as long as ``reversible`` is True: nothing
    but the parts may have been trained since.
    """

    def __init__(self, model: PreTrainedModel, steps: Iterable[Step], build: Build, keep_originals: bool = True):
        self.steps = tuple(steps)
        self.reversible = keep_originals
        self._undo: list[Callable[[], None]] = []
        try:
            self._install(model, build)
        except BaseException:
            self.reversible = True
            self.undo()
            raise
        if not keep_originals:
            self._undo.clear()

    def undo(self) -> None:
        """Remove every part. Raises TautError when the original weights are gone."""
        if not self.reversible:
            raise TautError(
                "the original weights are gone: this model was loaded compressed, or healed beyond its parts; load the "
                "original instead"
            )
        while self._undo:
            self._undo.pop()()

    def _install(self, model: PreTrainedModel, build: Build) -> None:
        for step in self.steps:
            if isinstance(step.method, PartMethod):
                if isinstance(step.site, TableSite):
                    self._install_table(model, step, build)
                else:
                    self._swap(model, step.site.path, build(step, model.get_submodule(step.site.path)))
            elif (learned := build(step, model.get_submodule(step.site.path))) is not None:
                self._join(model.get_submodule(step.site.path), learned)
        for path in taken_out((step.site, step.method) for step in self.steps):
            module = model.get_submodule(path)
            if isinstance(module, nn.Embedding):
                self._swap(model, path, NoPositions(module))
            else:
                self._undo.append(module.register_forward_hook(unturned).remove)
        attention = {
            step.site.path: (step.method, step.site)
            for step in self.steps
            if isinstance(step.method, AttentionMethod) and isinstance(step.site, AttentionSite)
        }
        if attention:
            self._undo.append(install_attention(model, attention))
        for step in self.steps:
            if isinstance(step.method, MemoryMethod) and isinstance(step.site, MemorySite):
                self._undo.append(install_memory(model, step.method, step.site))
        hook = model.register_load_state_dict_pre_hook(partial(restore_state_shapes, self.steps))
        self._undo.append(hook.remove)

    def _install_table(self, model: PreTrainedModel, step: Step, build: Build) -> None:
        site = step.site
        part = build(step, model.get_submodule(site.path))
        self._untie(model, {site.path, *site.copies, *site.heads})
        self._swap(model, site.path, part)
        for path in site.copies:
            self._swap(model, path, SharedTable(part))
        for path in site.heads:
            self._swap(model, path, SharedHead(part, model.get_submodule(path).bias))
        resize = model.resize_token_embeddings
        # transformers' own resizing needs an nn.Embedding, so replace it by a function that explains.
        self._set(model, "resize_token_embeddings", partial(_explain_resize, resize))

    def _untie(self, model: PreTrainedModel, paths: set[str]) -> None:
        """Drop the named ties of weights that the parts replace. Ties of biases stay."""
        weights = {f"{path}.weight" for path in paths}
        for prefix, module in list(model.named_modules()):
            if isinstance(module, PreTrainedModel):
                ties = module.get_expanded_tied_weights_keys()
                lead = f"{prefix}." if prefix else ""
                kept = {a: b for a, b in ties.items() if not {lead + a, lead + b} & weights}
                self._set(module, "_tied_weights_keys", kept)
                all_ties = module.all_tied_weights_keys
                self._set(
                    module,
                    "all_tied_weights_keys",
                    {a: b for a, b in all_ties.items() if not {lead + a, lead + b} & weights},
                )

    def _swap(self, model: PreTrainedModel, path: str, new: nn.Module) -> None:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path)
        old = getattr(parent, name)
        new.train(old.training)
        setattr(parent, name, new)
        self._undo.append(partial(setattr, parent, name, old))

    def _join(self, module: nn.Module, learned: nn.Module) -> None:
        module.add_module(LEARNED, learned.train(module.training))
        self._undo.append(partial(delattr, module, LEARNED))

    def _set(self, owner: nn.Module, name: str, value: object) -> None:
        """Set an attribute of an instance. Undoing restores the previous value, of the instance or the class."""
        if name in vars(owner):
            self._undo.append(partial(setattr, owner, name, vars(owner)[name]))
        else:
            self._undo.append(partial(delattr, owner, name))
        setattr(owner, name, value)


def fitted(step: Step, original: nn.Module, calibration: dict) -> Part:
    """Build a part and fit it to the trained module it replaces, on the same device and in the same dtype."""
    weight = original.weight.detach()
    part = step.method.build(step.site, weight.device, weight.dtype)
    transposed = isinstance(step.site, LinearSite) and step.site.transposed
    with torch.no_grad():
        step.method.fit(part, weight.t() if transposed else weight, calibration[step.site.name])
        if isinstance(part, LinearPart) and part.bias is not None:
            part.bias.copy_(original.bias)
    if not original.weight.requires_grad:
        part.requires_grad_(False)
    return part


def started(step: Step, device: torch.device, seed: int) -> nn.Module | None:
    """Build the module that an attention or memory method trains, with its start values; None if there is none."""
    with torch.random.fork_rng():
        # Each layer gets a different random start.
        torch.manual_seed(seed + 1009 * (step.site.layer or 0))
        return step.method.learned(step.site, device, getattr(torch, step.site.dtype))


def empty(step: Step, original: nn.Module) -> nn.Module | None:
    """Build the module of a step on the meta device, to be filled by loading; None if there is none."""
    if isinstance(step.method, PartMethod):
        return step.method.build(step.site, torch.device("meta"), original.weight.dtype)
    return step.method.learned(step.site, torch.device("meta"), getattr(torch, step.site.dtype))


def dense_module(site: TableSite | LinearSite, part: Part, original: nn.Module) -> None:
    """Write the part's dense equivalent into ``original``, the original kind of module at the same site."""
    weight = part.merged().to(original.weight.dtype)
    if isinstance(original, Conv1D):
        weight = weight.t()
    original.weight.data = weight.contiguous()
    if isinstance(part, LinearPart) and part.bias is not None:
        original.bias.data = part.bias.detach().clone()


def _explain_resize(resize: Callable, new_num_tokens: int | None = None, *_: object, **__: object) -> nn.Module:
    if new_num_tokens is None:
        return resize.__self__.get_input_embeddings()
    raise TautError(
        f"resize_token_embeddings({new_num_tokens}): the token table is compressed and cannot grow. Resize the "
        "original model and apply the recipe to it (a model compressed in memory: taut.undo, resize, taut.apply)"
    )
