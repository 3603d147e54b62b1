"""A training step of a small decoder with structured feed-forward maps against the dense one, end to end.

Forward, backward, gradient clipping and AdamW, through the module and the optimizer that ``taut train`` uses. Beside
it, without a promise, what a step costs while all guides are computed.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import against, options, record
from torch import Tensor

import taut
from taut.core.registry import METHODS
from taut.measurement.clock import compare
from taut.surgery.loading import open_model, resolve
from taut.training.budget import costs_of
from taut.training.guide import Guides, guided_parts
from taut.training.objective import LanguageModelling
from taut.training.spec import TrainSpec
from taut.training.trainer import make_optimizer

KEEP, TARGET = 0.32, 1.25
WIDTH, LAYERS, VOCABULARY, BATCH, LENGTH = 512, 6, 4096, 8, 256
CLAIM = (
    f"training step of a {LAYERS}-layer, width-{WIDTH} decoder (vocabulary {VOCABULARY:,}, {BATCH} x {LENGTH} tokens) "
    f"with feed-forward maps at keep {KEEP}: at least {TARGET}x the tokens/s of dense"
)
MAPS = ("low_rank", "block_dense", "block_shuffle")


def decoder(width: int, layers: int, method: str | None, guided: bool = False) -> LanguageModelling:
    """A GPT-2 of this size, float32, without dropout: plain MLPs four times as wide, biases, a tied table. The first
    layer stays dense, as published."""
    dropout = "attn_pdrop=0,resid_pdrop=0,embd_pdrop=0,bos_token_id=0,eos_token_id=0"
    sizes = f"n_embd={width},n_layer={layers},n_head={width // 64},n_positions={LENGTH},vocab_size={VOCABULARY}"
    model = open_model(resolve(f"gpt2:{sizes},{dropout}"))
    if method is not None:
        taut.apply(model, {"feedforward": {"method": method, "keep": KEEP, "layers": "1:"}})
    guides = Guides(guided_parts(model, ("feedforward",)), stochastic=False) if guided else None
    return LanguageModelling(model, guides, lambda step: 0.5).train()


def step(task: LanguageModelling, ids: Tensor, spec: TrainSpec) -> Callable[[], None]:
    optimizer = make_optimizer(task, spec)

    def run() -> None:
        if task.guides is not None:
            task.guides.begin(0, 0.5)
        task(ids, ids)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), spec.clip)
        optimizer.step()
        optimizer.zero_grad()

    return run


def rows(names: list[str], guided: bool, quick: bool, device: str, repeats: int) -> Iterator[dict[str, Any]]:
    """Dense and these maps in turns, without guides or with, so that few models share the memory."""
    width, layers = (128, 2) if quick else (WIDTH, LAYERS)
    spec = TrainSpec.load({"model": "gpt2", "text": "builtin", "budget": {"steps": 1}})
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    tasks = {"dense": decoder(width, layers, None)}
    tasks |= {name: decoder(width, layers, name, guided) for name in names}
    flops = {name: costs_of(task.model, LENGTH, task.guides) for name, task in tasks.items()}
    cases = {name: step(task.to(device), ids, spec) for name, task in tasks.items()}
    for threads in (1, 2) if device == "cpu" else (1,):
        times = compare(cases, repeats=repeats, warmup=1, threads=threads, device=device)
        for name in names:
            dense, ours = flops["dense"], flops[name]
            at_most = dense.model / (ours.model + ours.guides)
            speed = round(BATCH * LENGTH / times[name].median)
            where = {"maps": f"{name}, guided" if guided else name, "threads": threads}
            where |= {"tokens/s": speed, "by FLOPs": at_most}
            # Guides cost what they cost; nothing is promised of their phase.
            yield against(times["dense"], times[name], None if guided else TARGET, **where)


def main() -> int:
    arguments = options(CLAIM, repeats=15, methods=",".join(MAPS))
    names = [name for name in arguments.methods.split(",") if f"linear.{name}" in METHODS.ids("linear")]
    repeats = 3 if arguments.quick else arguments.repeats
    found = [*rows(names, False, arguments.quick, arguments.device, repeats)]
    found += rows(names, True, arguments.quick, arguments.device, max(3, repeats // 3))
    notes = "linear maps of torch and fused AdamW on both sides; 'by FLOPs': the ratio that FLOPs alone would give"
    passed = all(row["holds"] for row in found if "holds" in row)
    return record("training_step", CLAIM, found, passed, notes, arguments.quick, arguments.device)


if __name__ == "__main__":
    raise SystemExit(main())
