"""Does a compressive memory that has learned to compress lose less than one that takes means? The model stays as it is.

stories260K reads held-out stories in windows of 512 tokens. All but the compressor is frozen, which learns on other
stories of the same file, once from what attention misses and once from the loss of the model. The text is short (66,000
tokens), so pools that learn from the loss learn the stories as well. Needs TAUT_MODELS and TAUT_DATA.
"""

import math
from typing import Any

import torch
from harness import options, record
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from taut.core.recipe import Recipe
from taut.data.texts import text
from taut.ops.caches.pooling import Compressor
from taut.surgery.apply import apply
from taut.surgery.loading import open_model, open_tokenizer, resolve

CLAIM = "with the model frozen, a convolution that learns from what attention misses loses less than the mean"
SHAPE = {"method": "compressive", "segment": 16, "memory": 48, "compressed": 64, "rate": 4}
LENGTH, HELD = 512, 40
FIXED: dict[str, dict[str, Any]] = {
    "full attention": {},
    "mean": {"pool": "mean"},
    "max": {"pool": "max"},
    "most used, read in segments": {"pool": "most_used"},
}


def main() -> int:
    arguments = options(CLAIM, model="stories260K", data="tinystories", steps=120, batch=4, rate=5e-3)
    steps, count = (2, 2) if arguments.quick else (arguments.steps, HELD)
    source = resolve(arguments.model)
    held, learned = windows(open_tokenizer(source), arguments.data, count)
    rows = []
    for name, pool in FIXED.items():
        model = compressive(source, pool)
        segment = SHAPE["segment"] if pool.get("pool") == "most_used" else LENGTH
        rows.append({"pool": name, "learned from": "", "perplexity": perplexity(model, held, segment)})
    for pool in ("conv", "dilated"):
        for objective in ("attention", "loss"):
            model = compressive(source, {"pool": pool})
            before = missed(model, held)
            teach(model, learned, objective, steps, arguments)
            facts = {"pool": pool, "learned from": objective, "perplexity": perplexity(model, held, LENGTH)}
            rows.append(facts | {"missed before": before, "missed": missed(model, held)})
    mean, conv = rows[1], rows[len(FIXED)]
    passed = conv["missed"] < conv["missed before"] and conv["perplexity"] < mean["perplexity"]
    return record(
        "learned_compression", CLAIM, rows, passed, f"{steps} steps of {arguments.batch} windows", arguments.quick
    )


def windows(tokenizer: Any, data: str, count: int) -> tuple[Tensor, Tensor]:
    """Held-out windows and those to learn from, (N, LENGTH) each."""
    ids = torch.tensor(tokenizer("\n\n".join(row[0] for row in text(data).rows))["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return rows[:count], rows[HELD:]


def compressive(source: Any, pool: dict[str, Any]) -> PreTrainedModel:
    model = open_model(source, torch.float32)
    if pool:
        apply(model, Recipe.parse({"memory": SHAPE | pool}))
    return model.eval().requires_grad_(False)


def compressor_of(model: PreTrainedModel) -> Compressor:
    return next(module for module in model.modules() if isinstance(module, Compressor))


def loss(model: PreTrainedModel, ids: Tensor, segment: int = LENGTH) -> Tensor:
    """Nats a token, the text read through the cache where it comes in segments."""
    past, found = None, []
    for piece in ids.split(segment, 1):
        output = model(input_ids=piece, past_key_values=past, use_cache=segment < LENGTH)
        past = output.past_key_values if segment < LENGTH else None
        found.append(output.logits)
    return F.cross_entropy(torch.cat(found, 1)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def attention_missed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with compressor_of(model).reconstructing() as errors:
        model(input_ids=ids, use_cache=False)
    return sum(errors)


@torch.no_grad()
def perplexity(model: PreTrainedModel, held: Tensor, segment: int) -> float:
    return math.exp(sum(float(loss(model, ids, segment)) for ids in held.split(1)) / len(held))


@torch.no_grad()
def missed(model: PreTrainedModel, held: Tensor) -> float:
    return sum(float(attention_missed(model, ids)) for ids in held.split(1)) / len(held)


def teach(model: PreTrainedModel, learned: Tensor, objective: str, steps: int, arguments: Any) -> None:
    tensors = list(compressor_of(model).requires_grad_(True).parameters())
    adam = torch.optim.Adam(tensors, lr=arguments.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = learned[torch.randint(len(learned), (arguments.batch,), generator=generator)]
        adam.zero_grad()
        (attention_missed(model, ids) if objective == "attention" else loss(model, ids)).backward()
        adam.step()
        schedule.step()


if __name__ == "__main__":
    raise SystemExit(main())
