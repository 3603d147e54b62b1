"""Removes the model's own positions, for attention methods that have positions of their own."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.errors import TautError
from taut.core.site import AttentionSite, Site
from taut.methods.base import AttentionMethod, Method


class NoPositions(nn.Module):
    """A position table that adds nothing, for any length of text. Its tensor stays, because checkpoints hold it."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.weight = table.weight

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Return zeros (D,) for any input, as the sum of no rows: so the table still gets a gradient, of zeros."""
        return self.weight[:0].sum(0)


def unturned(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The hook after a rotary module: return cosines of one and sines of zero, or the same as complex numbers.

    Raises TautError for an output of another kind.
    """
    if isinstance(output, Tensor) and output.is_complex():
        return torch.ones_like(output)
    if isinstance(output, tuple) and len(output) == 2:
        cosines, sines = output
        return torch.ones_like(cosines), torch.zeros_like(sines)
    raise TautError(
        f"{type(module).__name__} returns {type(output).__name__}, not cosines and sines: the model's own positions "
        "cannot be removed"
    )


def check_whole_stacks(chosen: Iterable[tuple[Site, Method]], sites: Iterable[Site], source: str) -> None:
    """Check that a method with its own positions covers whole stacks: other layers would have no positions.

    Raises TautError if it leaves out layers of a stack.
    """
    placed = {site.name: (site.stack, method) for site, method in chosen if _replaces(site, method)}
    layers = [site for site in sites if isinstance(site, AttentionSite)]
    for stack, method in placed.values():
        lacking = [str(site.layer) for site in layers if site.stack == stack and site.name not in placed]
        if lacking:
            raise TautError(
                f"{source}: attention: {method.id} removes the model's own positions from the whole stack: give every "
                f"layer the method (layers {', '.join(lacking)} lack it)"
            )


def taken_out(chosen: Iterable[tuple[Site, Method]]) -> tuple[str, ...]:
    """Return the paths of the modules whose positions are removed, each once."""
    paths = [path for site, method in chosen if _replaces(site, method) for path in site.positions]
    return tuple(dict.fromkeys(paths))


def _replaces(site: Site, method: Method) -> bool:
    return isinstance(site, AttentionSite) and isinstance(method, AttentionMethod) and method.own_positions
