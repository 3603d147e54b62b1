"""The default attention, used where no method was chosen: transformers' own, under a view."""

from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from taut.ops.attention import blocked, sections
from taut.ops.attention.masks import View


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, view: View, **options: Any) -> Tensor:
    """Attention (B, H, T, K), (B, H', S, K), (B, H', S, K) -> (B, T, H, K). With a plain ``view`` the result equals
    that of transformers' ``sdpa`` to the bit. Under a pattern with a band or sections, long inputs use a kernel of
    blocks instead of a T x S mask."""
    band = None if view.pattern is None else view.pattern.band
    if band is not None and view.causal and view.key_positions is None and view.keys > band[0]:
        chosen = {name: options[name] for name in ("scaling", "dropout", "position_bias") if name in options}
        return blocked.attend(query, key, value, view, window=band[0], first=band[1], **chosen)
    if "position_bias" not in options and (plan := sections.plan(view, query.device)) is not None:
        chosen = {"scaling": options.get("scaling"), "dropout": options.get("dropout", 0.0)}
        return sections.attend(query, key, value, view, plan, **chosen)
    return sdpa_attention_forward(module, query, key, value, view.dense(query.device), **options)[0]
