"""How much the vectors of a token table matter: gradients of a loss on text, by looked-up vector."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from taut.core.site import TableSite
from taut.surgery.modes import evaluating

MASKED_SHARE = 0.15
"""The share of tokens that is masked, as in the training of masked models."""

GRADIENT_FIELDS = frozenset({"gradient", "sensitivity", "metric"})
"""The fields of Calibration that this module computes."""


def table_gradients(
    model: PreTrainedModel, sites: Iterable[TableSite], batches: Iterable[dict[str, Tensor]], seed: int = 0
) -> dict[str, dict[str, Tensor]]:
    """Compute ``gradient`` (V,), ``sensitivity`` (V,) and ``metric`` (D, D) of each table, float64, by site name.

    With a language-modelling head the loss is the model's own, summed over tokens, with the text as its labels. It
    predicts the next token (encoder-decoders: of the decoder). Masked models predict 15 % masked tokens, or every
    token, unmasked, if the configuration names no mask token. So ``sensitivity`` is the empirical Fisher information
    of a row, per number.

    Without a head it is the Gauss-Newton matrix of half the squared change of the first output (the hidden states),
    summed over real tokens. Random signs from ``seed`` are backpropagated in place of a loss's gradient.

    A change dE of row v raises the summed loss by about ``sensitivity[v]`` ||dE||^2 / 2. Padding does not count: it
    has no loss, and the attention mask hides it from the other tokens. The model stays unchanged.
    """
    tallies = {site.name: _Tally(site) for site in sites}
    generator = torch.Generator().manual_seed(seed)
    with _watched(model, tallies.values()):
        for batch in batches:
            for tally in tallies.values():
                tally.begin()
            with torch.enable_grad():
                loss = _loss(model, batch, generator)
            wanted = [tensor for tally in tallies.values() for tensor in tally.tensors()]
            gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
            remaining = iter(gradients)
            for tally in tallies.values():
                tally.add(remaining)
    return {name: tally.result() for name, tally in tallies.items()}


class _Tally:
    """Running sums of one table, float64, filled by hooks on its lookups and on the heads tied to it."""

    def __init__(self, site: TableSite) -> None:
        self.site = site
        self.lookups: list[tuple[Tensor, Tensor]] = []
        self.scores: list[tuple[Tensor, Tensor]] = []
        self.gradient = torch.zeros(site.rows, dtype=torch.float64)
        self.sensitivity = torch.zeros(site.rows, dtype=torch.float64)
        self.metric = torch.zeros(site.width, site.width, dtype=torch.float64)
        self.occurrences = 0

    def begin(self) -> None:
        self.lookups.clear()
        self.scores.clear()

    def lookup(self, module: nn.Module, arguments: tuple[Tensor, ...], vectors: Tensor) -> Tensor:
        """The hook after a lookup: it cuts the graph at the looked-up vectors, as nothing before needs a gradient."""
        vectors = vectors.detach().requires_grad_()
        self.lookups.append((arguments[0], vectors))
        return vectors

    def head(self, module: nn.Module, arguments: tuple[Tensor, ...], logits: Tensor) -> None:
        self.scores.append((arguments[0].detach(), logits))

    def tensors(self) -> list[Tensor]:
        return [vectors for _, vectors in self.lookups] + [logits for _, logits in self.scores]

    @torch.no_grad()
    def add(self, gradients: Iterator[Tensor]) -> None:
        """Add the gradients with respect to ``tensors()``, in that order."""
        width = self.site.width
        for ids, _ in self.lookups:
            # The gradient with respect to the stored row, which a lookup multiplies by the scale.
            rows = next(gradients).reshape(-1, width).double() * self.site.scale
            squares, flat = rows.square().sum(1).cpu(), ids.reshape(-1).cpu()
            self.gradient.index_add_(0, flat, squares.sqrt())
            self.sensitivity.index_add_(0, flat, squares / width)
            self.metric += (rows.T @ rows).cpu()
            self.occurrences += int(squares.count_nonzero())
        for hidden, _ in self.scores:
            # The gradient of row v at position t is c_tv h_t. Sum |c_tv h_t|^2 without a tensor of (T, V, D).
            slopes = next(gradients).flatten(0, -2).float().square()
            states = hidden.reshape(-1, width).double()
            self.sensitivity += (slopes.T @ states.square().sum(1).float()).double().cpu() / width
            self.metric += (states.T @ (states * slopes.sum(1).double()[:, None])).cpu()

    def result(self) -> dict[str, Tensor]:
        metric = self.metric / max(1, self.occurrences)
        return {"gradient": self.gradient, "sensitivity": self.sensitivity, "metric": metric}


def _loss(model: PreTrainedModel, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
    """Compute the scalar to differentiate; see ``table_gradients``."""
    arguments = {name: tensor for name, tensor in batch.items() if name != "labels"}
    two_stacks = model.config.is_encoder_decoder
    ids = arguments["decoder_input_ids" if two_stacks else "input_ids"]
    mask = arguments.get("decoder_attention_mask" if two_stacks else "attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if model.get_output_embeddings() is None:
        return _signed_sum(model(**arguments)[0], real, generator)
    if two_stacks or model.can_generate():
        logits, counted = model(**arguments)["logits"][:, :-1], real[:, 1:] & real[:, :-1]
        return F.cross_entropy(logits[counted].float(), ids[:, 1:][counted], reduction="sum")
    mask_id = model.config.to_dict().get("mask_token_id")
    if mask_id is not None:
        real = real & (torch.rand(ids.shape, generator=generator) < MASKED_SHARE).to(ids.device)
        arguments["input_ids"] = torch.where(real, mask_id, ids)
    return F.cross_entropy(model(**arguments)["logits"][real].float(), ids[real], reduction="sum")


def _signed_sum(output: Tensor, real: Tensor, generator: torch.Generator) -> Tensor:
    """Sum all numbers at real tokens, each with a random sign."""
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    if output.dim() == 3 and output.shape[:2] == real.shape:
        signs = signs * real.to(signs)[..., None]
    return (output * signs).sum()


@contextmanager
def _watched(model: PreTrainedModel, tallies: Iterable[_Tally]) -> Iterator[None]:
    """Set the hooks, freeze the parameters and use evaluation mode. Afterwards, restore everything."""
    handles: list[Any] = []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for tally in tallies:
        # T5 may hold one module under several names.
        for module in dict.fromkeys(model.get_submodule(path) for path in (tally.site.path, *tally.site.copies)):
            handles.append(module.register_forward_hook(tally.lookup))
        for path in tally.site.heads:
            handles.append(model.get_submodule(path).register_forward_hook(tally.head))
    with evaluating(model):
        try:
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in trainable:
                parameter.requires_grad_(True)
            for handle in handles:
                handle.remove()
