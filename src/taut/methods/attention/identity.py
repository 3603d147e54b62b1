"""The original attention, computed through our attention function: any difference is the error bar of comparisons."""

from typing import Any

from torch import Tensor, nn

from taut.core.cost import Cost
from taut.core.site import AttentionSite, Site
from taut.methods.base import AttentionMethod
from taut.ops.attention import sdpa
from taut.ops.attention.masks import Causal, View


class Identity(AttentionMethod):
    """Softmax over all pairs, equal to the bit to transformers' own ``sdpa`` implementation."""

    id = "attention.identity"
    summary = "the original attention, unchanged"
    source = "none: the control"

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, AttentionSite):
            return "not an attention"
        return "the model caps its attention scores (softcap), which fused kernels cannot do" if site.softcap else None

    def predict(self, site: AttentionSite) -> Cost:
        return site.dense()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: View, **options: Any
    ) -> Tensor:
        return sdpa.attend(module, query, key, value, view, **options)

    def pairs(self, site: AttentionSite) -> int:
        return Causal().pairs(site.length) if site.causal else site.length**2
