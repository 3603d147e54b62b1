"""The original attention, reached through our function: the difference it shows is our error bar."""

from typing import Any

from torch import Tensor, nn

from taut.core.cost import Cost
from taut.core.site import AttentionSite, Site
from taut.methods.base import AttentionMethod
from taut.ops.attention import sdpa
from taut.ops.attention.masks import Causal, View


class Identity(AttentionMethod):
    """Softmax over all pairs, to the bit what the ``sdpa`` implementation of transformers gives."""

    id = "attention.identity"
    summary = "the original attention, unchanged"
    source = "none: the control"

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, AttentionSite):
            return "not an attention"
        return "the model caps its attention scores, which fused kernels cannot do" if site.softcap else None

    def predict(self, site: AttentionSite) -> Cost:
        return site.dense()

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: View, **options: Any
    ) -> Tensor:
        return sdpa.attend(module, query, key, value, view, **options)

    def pairs(self, site: AttentionSite) -> int:
        return Causal().pairs(site.length) if site.causal else site.length**2
