"""Attention under the anchors' mask in sections, against a mask of all pairs and against full causal attention."""

from collections.abc import Callable

import torch
from harness import against, options, record
from torch import Tensor
from torch.nn import functional as F

from taut.measurement.clock import compare
from taut.methods.memory.anchor.cache import Anchoring, Segments
from taut.ops.attention import blocked, sections
from taut.ops.attention.masks import View
from taut.ops.caches.base import Incoming

HEADS, WIDTH, SEGMENT = 8, 64, 25
TARGETS = {512: None, 1024: None, 4096: 3.0, 8192: 5.0}
CLAIM = (
    f"attention under the anchors' mask, a segment every {SEGMENT} tokens: 3x faster than a call with the mask of all "
    f"pairs at 4096 tokens, 5x at 8192, forward and with gradients (B = 1, {HEADS} heads of {WIDTH}, fp32, 1 thread)"
)


def cases(length: int, gradients: bool, device: str) -> dict[str, Callable[[], None]]:
    """The three ways on the same random numbers; making the plan and the masks belongs to it."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, HEADS, length, WIDTH, generator=generator).to(device) for _ in range(3)]
    query, key, value = (each.requires_grad_(gradients) for each in inputs)
    there = torch.device(device)
    ids = torch.arange(length, device=there)[None]
    anchoring = Anchoring((), SEGMENT)
    incoming = Incoming(length, there, ids)
    marks, _ = anchoring.marks(incoming, anchoring.start(incoming))

    def view() -> View:
        return View(1, length, length, causal=True, pattern=Segments(), marks=(marks, marks))

    # Models on a GPU do not go this way: because of what is measured here.
    block = None if device == "cpu" else blocked.DEVICE_ROWS

    def in_sections() -> Tensor:
        seen = view()
        return sections.attend(query, key, value, seen, sections.plan(seen, there, block), scaling=None)

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, view().dense(there)).transpose(1, 2)

    def causal() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    def run(way: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.set_grad_enabled(gradients):
                out = way()
                if gradients:
                    out.sum().backward()

        return call

    ways = {"mask": masked, "causal": causal}
    if sections.plan(view(), there, block) is not None:
        ways["sections"] = in_sections
        with torch.no_grad():
            torch.testing.assert_close(in_sections(), masked(), atol=1e-3, rtol=1e-3)
    return {name: run(way) for name, way in ways.items()}


def main() -> int:
    arguments = options(CLAIM, repeats=11)
    rows = []
    for length, target in {1024: None}.items() if arguments.quick else TARGETS.items():
        for gradients in (False, True):
            tried = cases(length, gradients, arguments.device)
            if "sections" not in tried:
                rows.append({"length": length, "gradients": gradients, "against": "not planned: the mask is as fast"})
                continue
            times = compare(
                tried, repeats=3 if arguments.quick else arguments.repeats, threads=1, device=arguments.device
            )
            for other in ("mask", "causal"):
                wanted = target if other == "mask" and arguments.device == "cpu" else None
                where = {"length": length, "gradients": gradients, "against": other}
                rows.append(against(times[other], times["sections"], wanted, **where))
    passed = all(row.get("holds", True) for row in rows) if arguments.device == "cpu" else None
    notes = (
        "causal: full attention, which looks at more; nothing is promised against it. Masks and plans are timed, too"
    )
    return record("anchor_attention", CLAIM, rows, passed, notes, arguments.quick, arguments.device)


if __name__ == "__main__":
    raise SystemExit(main())
