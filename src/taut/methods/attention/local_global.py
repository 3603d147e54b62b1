"""Window and global attention, exact, in time and memory linear in the length."""

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
        256, ge=1, description="positions visible to each side, the token itself included (causal: to the left only)"
    )
    global_tokens: int = Field(
        1,
        ge=0,
        description="leading tokens that all see and that, in encoders, see all; the default 1 is the encoder's "
        "summary token, and the decoder's first token, which trained models use as an attention sink",
    )


class LocalGlobal(AttentionMethod):
    """Each token sees its neighbours and the first tokens.

    Allowed pairs: causal 0 <= i - j < window or j < global_tokens; else |i - j| < window or i or j < global_tokens.
    ``keep`` counts allowed pairs against the dense ones, n (n + 1) / 2 when causal and n^2 when not. Predicted FLOPs
    count every score that the CPU kernel computes, masked ones in its blocks included, against n^2 as the site does.
    """

    id = "attention.local_global"
    summary = "sliding window plus global tokens, exact, never n x n"
    source = (
        "Beltagy et al. 2020 (2004.05150), Longformer; Zaheer et al. 2020 (2007.14062), BigBird. Changed: one set of "
        "projections for all tokens (no separate global ones), no dilation, no random blocks, global tokens are the "
        "first ones; computed by a loop of fused calls over contiguous slices"
    )
    Knobs = LocalGlobalKnobs
    dial = "window"
    knobs: LocalGlobalKnobs

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, AttentionSite):
            return "not an attention"
        return "the model caps its attention scores, which fused kernels cannot do" if site.softcap else None

    def solve(self, site: AttentionSite, keep: float) -> "LocalGlobal":
        """The largest window whose allowed pairs are at most ``keep`` of the dense ones."""
        length = site.length
        budget = keep * (Causal().pairs(length) if site.causal else length**2)
        low, high = 0, length
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._with(middle).pairs(site) <= budget else (low, middle - 1)
        if low == 0:
            least = self._with(1).pairs(site) / (Causal().pairs(length) if site.causal else length**2)
            raise TautError(
                f"{self.id}: keep = {keep} at length {length} is less than a window of 1 with "
                f"{self.knobs.global_tokens} global tokens needs; the least keep is {least:.4f}"
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
        """The closed form: the window, and each global token's pairs beyond it, twice when not causal."""
        window, first = self.knobs.window, self.knobs.global_tokens
        beyond = blocked.local(window, first, causal=True).beyond(site.length)
        return Window(window, site.causal).pairs(site.length) + beyond * (1 if site.causal else 2)

    def _with(self, window: int) -> "LocalGlobal":
        return LocalGlobal(self.knobs.model_copy(update={"window": window}))
