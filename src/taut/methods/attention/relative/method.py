"""Transformer-XL's attention: scores from contents and distances, not from absolute positions."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from taut.core.cost import Cost
from taut.core.site import AttentionSite, Site
from taut.methods.attention.relative import kernel
from taut.methods.base import LEARNED, AttentionMethod, Knobs
from taut.ops.attention.masks import Causal, View

STANDARD_DEVIATION = 0.02
"""The start of the learned tensors, as in the paper's code."""


class RelativeKnobs(Knobs):
    clamp: int | None = Field(
        None,
        ge=1,
        description="larger distances count as this one (the paper's clamp_len); default: all distances differ",
    )


class Distances(nn.Module):
    """The learned tensors of one attention module.

    ``weight`` W (H' K, D = H K) maps the sinusoid of a distance to a key for each key head. ``content_bias`` u and
    ``distance_bias`` v, (H K,), are added to the queries.
    """

    def __init__(self, site: AttentionSite, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        width, keys = site.heads * site.head_width, site.key_heads * site.head_width
        self.weight = nn.Parameter(torch.empty(keys, width, device=device, dtype=dtype))
        self.content_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.distance_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))


class Relative(AttentionMethod):
    """score(i, j) = scaling ((q_i + u).k_j + (q_i + v).(W R_{i-j})), with R the sinusoid of a distance.

    The model's own positions are removed from the whole stack: rotary modules rotate by zero, and position tables add
    zero. (The tables stay in the checkpoint, but no longer limit the length of a decoder's text.) Distances are 0 or
    more if causal; in encoders they have both signs, as in XLNet.

    Predicted FLOPs count all n x n pairs, as for the original. For each token they add n products of queries and
    distances (in encoders one block of queries more), and W times one distance (in encoders two).
    """

    id = "attention.relative"
    summary = "scores from contents and distances, without the model's own positions; must be trained"
    source = (
        "Dai et al. 2019, Transformer-XL (arXiv 1901.02860). Changed: each layer has its own u and v (untied); "
        "query heads that share keys also share W R; R is as wide as all heads together (in the paper as wide as the "
        "model, which is the same there); encoders see distances of both signs (XLNet, Yang et al. 2019, arXiv "
        "1906.08237)"
    )
    Knobs = RelativeKnobs
    own_positions = True
    knobs: RelativeKnobs

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, AttentionSite):
            return "not an attention"
        if site.softcap:
            return "the model caps its attention scores (softcap), which fused kernels cannot do"
        if site.position == "bias":
            return "the model already adds a relative position bias to its scores (T5), which cannot be removed"
        if site.position != "none" and not site.positions:
            return "it is unknown where the model's own positions enter, so they cannot be removed"
        return None

    def learned(self, site: AttentionSite, device: torch.device, dtype: torch.dtype) -> Distances:
        learned = Distances(site, device, dtype)
        if device.type != "meta":
            for tensor in learned.parameters():
                nn.init.normal_(tensor, std=STANDARD_DEVIATION)
        return learned

    def note(self, site: AttentionSite) -> str:
        return f"the model's own positions ({site.position}) are removed: train it, trained weights do not fit"

    def predict(self, site: AttentionSite) -> Cost:
        width, keys = site.heads * site.head_width, site.key_heads * site.head_width
        parameters = keys * width + 2 * width
        products = site.length if site.causal else site.length + min(site.length, kernel.CPU_ROWS)
        distances = 2.0 * width * products + 2.0 * keys * width * (1 if site.causal else 2)
        return Cost(parameters, parameters * site.width_in_bytes, site.flops(float(site.length) ** 2) + distances)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: View, **options: Any
    ) -> Tensor:
        learned: Distances = module.get_submodule(LEARNED)
        tensors = dict(learned.named_parameters())
        return kernel.attend(query, key, value, view, clamp=self.knobs.clamp, **tensors, **options)

    def pairs(self, site: AttentionSite) -> int:
        return Causal().pairs(site.length) if site.causal else site.length**2
