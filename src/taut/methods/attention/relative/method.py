"""Transformer-XL's attention: scores from contents and from distances, none from positions."""

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
"""What the paper's code starts with."""


class RelativeKnobs(Knobs):
    clamp: int | None = Field(
        None, ge=1, description="distances beyond it count as it (the paper's clamp_len); none: all differ"
    )


class Distances(nn.Module):
    """What one attention learns: ``weight`` W (H' K, D = H K), from the sinusoid of a distance to a key for each key
    head, and what is added to the queries, ``content_bias`` u and ``distance_bias`` v, (H K,)."""

    def __init__(self, site: AttentionSite, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        width, keys = site.heads * site.head_width, site.key_heads * site.head_width
        self.weight = nn.Parameter(torch.empty(keys, width, device=device, dtype=dtype))
        self.content_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.distance_bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype))


class Relative(AttentionMethod):
    """score(i, j) = scaling ((q_i + u).k_j + (q_i + v).(W R_{i-j})), R the sinusoid of a distance.

    The model's own positions are taken out of the whole stack: rotary modules turn by nothing, tables of positions add
    nothing (they stay in the checkpoint, but set no limit to a decoder's text). Causal attention meets distances from
    0 up, an encoder's both signs, as in XLNet. Predicted FLOPs count what the original counts, all n x n pairs, and for
    each token n products of queries and distances (in encoders a block of queries more) and W on one distance (two).
    """

    id = "attention.relative"
    summary = "scores from contents and distances, with the model's own positions taken out; to be trained"
    source = (
        "Dai et al. 2019, Transformer-XL (arXiv 1901.02860). Changed: u and v are each layer's own (untied), query "
        "heads that share keys share W R too, R is as wide as all heads together (there as wide as the model, the "
        "same in its models), encoders see distances of both signs (as in XLNet, Yang et al. 2019, arXiv 1906.08237)"
    )
    Knobs = RelativeKnobs
    own_positions = True
    knobs: RelativeKnobs

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, AttentionSite):
            return "not an attention"
        if site.softcap:
            return "the model caps its attention scores, which fused kernels cannot do"
        if site.position == "bias":
            return "the model has a bias for relative positions on its scores already (T5), which is not taken out"
        if site.position != "none" and not site.positions:
            return "where the model's own positions enter was not found, so they cannot be taken out"
        return None

    def learned(self, site: AttentionSite, device: torch.device, dtype: torch.dtype) -> Distances:
        learned = Distances(site, device, dtype)
        if device.type != "meta":
            for tensor in learned.parameters():
                nn.init.normal_(tensor, std=STANDARD_DEVIATION)
        return learned

    def note(self, site: AttentionSite) -> str:
        return (
            f"the model's own positions ({site.position}) are taken out: train it from here, trained weights do not fit"
        )

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
