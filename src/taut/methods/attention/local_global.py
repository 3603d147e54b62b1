"""Window and global attention, exact, with time and memory linear in the length."""

from typing import Any

from pydantic import Field
from torch import Tensor, nn

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import AttentionSite, Site
from taut.methods.base import AttentionMethod, Knobs
from taut.ops.attention import blocked
from taut.ops.attention.masks import Causal, View, Window


class LocalGlobalKnobs(Knobs):
    window: int = Field(
        256, ge=1, description="visible positions on each side, including the token itself (causal: on the left only)"
    )
    global_tokens: int = Field(
        1,
        ge=0,
        description="first tokens that all tokens see; in encoders they also see all tokens. The default 1 is an "
        "encoder's summary token, or a decoder's first token, which trained models use as an attention sink",
    )


class LocalGlobal(AttentionMethod):
    """Each token sees its neighbours and the first tokens.

    Allowed pairs: if causal, j <= i and (i - j < window or j < global_tokens); else |i - j| < window, or i or j <
    global_tokens. ``keep`` is the number of allowed pairs divided by that of dense ones, n (n + 1) / 2 if causal, else
    n^2. Predicted FLOPs count every score the CPU kernel computes, including masked ones in its blocks; the dense cost
    counts n^2 scores.
    """

    id = "attention.local_global"
    summary = "sliding window plus global tokens; exact, no n x n matrix"
    source = (
        "Beltagy et al. 2020 (2004.05150), Longformer; Zaheer et al. 2020 (2007.14062), BigBird. Changed: one set of "
        "projections for all tokens (no separate global ones), no dilation, no random blocks, global tokens are the "
        "first ones; computed by a loop of fused attention calls over contiguous slices"
    )
    Knobs = LocalGlobalKnobs
    dial = "window"
    knobs: LocalGlobalKnobs

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, AttentionSite):
            return "not an attention"
        return "the model caps its attention scores (softcap), which fused kernels cannot do" if site.softcap else None

    def solve(self, site: AttentionSite, keep: float) -> "LocalGlobal":
        """Choose the largest window whose allowed pairs are at most ``keep`` of the dense ones.

        Raises TautError when a window of 1 is more.
        """
        length = site.length
        budget = keep * (Causal().pairs(length) if site.causal else length**2)
        low, high = 0, length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._with(middle).pairs(site) <= budget else (low, middle - 1)
        if low == 0:
            least = self._with(1).pairs(site) / (Causal().pairs(length) if site.causal else length**2)
            raise TautError(
                f"{self.id}: keep = {keep} at length {length} is too little for a window of 1 with "
                f"{self.knobs.global_tokens} global tokens; the least keep is {least:.4f}"
            )
        return self._with(low)

    def predict(self, site: AttentionSite) -> Cost:
        window, first = self.knobs.window, self.knobs.global_tokens
        return Cost(flops_per_token=site.flops(blocked.computed_pairs(site.length, window, first, site.causal)))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: View, **options: Any
    ) -> Tensor:
        return blocked.attend(
            query, key, value, view, window=self.knobs.window, first=self.knobs.global_tokens, **options
        )

    def pairs(self, site: AttentionSite) -> int:
        """Count the allowed pairs: those of the window, and those of global tokens beyond it (twice if not causal)."""
        window, first = self.knobs.window, self.knobs.global_tokens
        beyond = blocked.local(window, first, causal=True).beyond(site.length)
        return Window(window, site.causal).pairs(site.length) + beyond * (1 if site.causal else 2)

    def _with(self, window: int) -> "LocalGlobal":
        return LocalGlobal(self.knobs.model_copy(update={"window": window}))
