"""A training step of a small decoder with structured feed-forward maps against the dense one, end to end.

Forward, backward, gradient clipping and AdamW, through the module and the optimizer that ``taut train`` uses. Beside
it, without a promise, what a step costs while all guides are computed.
"""

from collections.abc import Callable

import torch
from harness import against, options, record
from torch import Tensor

import taut
from taut.core.registry import METHODS
from taut.measurement.clock import compare
from taut.surgery.source import open_model, resolve
from taut.training.budget import costs_of
from taut.training.guide import Guides, guided_parts
from taut.training.loop import make_optimizer
from taut.training.spec import TrainSpec
from taut.training.task import LanguageModelling

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


def main() -> int:
    given = options(CLAIM, repeats=12, methods=",".join(MAPS))
    width, layers = (128, 2) if given.quick else (WIDTH, LAYERS)
    spec = TrainSpec.load({"model": "gpt2", "text": "builtin", "budget": {"steps": 1}})
    names = [name for name in given.methods.split(",") if f"linear.{name}" in METHODS.ids("linear")]
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(given.device)
    tasks = {"dense": decoder(width, layers, None)}
    for name in names:
        tasks[name] = decoder(width, layers, name)
        tasks[f"{name}, guided"] = decoder(width, layers, name, guided=True)
    flops = {name: costs_of(task.model, LENGTH, task.guides) for name, task in tasks.items()}
    cases = {name: step(task.to(given.device), ids, spec) for name, task in tasks.items()}
    rows = []
    for threads in (1, 2) if given.device == "cpu" else (1,):
        repeats = 3 if given.quick else given.repeats
        times = compare(cases, repeats=repeats, warmup=1, threads=threads, device=given.device)
        for name in list(cases)[1:]:
            dense, ours = flops["dense"], flops[name]
            at_most = dense.model / (ours.model + ours.guides)
            # Guides cost what they cost; nothing is promised of their phase.
            target = None if "guided" in name else TARGET
            speed = round(BATCH * LENGTH / times[name].median)
            where = {"maps": name, "threads": threads, "tokens/s": speed, "by FLOPs": at_most}
            rows.append(against(times["dense"], times[name], target, **where))
    notes = "linear maps of torch and fused AdamW on both sides; 'by FLOPs': the ratio that FLOPs alone would give"
    passed = all(row["holds"] for row in rows if "holds" in row)
    return record("training_step", CLAIM, rows, passed, notes, given.quick)


if __name__ == "__main__":
    raise SystemExit(main())
