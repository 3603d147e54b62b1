"""Measures latency and throughput of whole models: a forward pass, prefill, and decoding with the model's own cache."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taut.core.errors import TautError
from taut.core.record import Quantity
from taut.measurement.clock import Prepared, Timing, compare

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Speed:
    """The speed of one model.

    ``forward``: seconds of one pass over ``tokens`` positions (for a decoder: prefill, filling the cache). ``decode``:
    seconds of one decoding step for the whole batch; None for a model without a cache.
    """

    forward: Timing
    tokens: int
    decode: Timing | None = None
    batch: int = 1

    def quantities(self) -> dict[str, Quantity]:
        quantities = {"forward": self.forward.quantity(), "throughput": throughput(self.forward, self.tokens)}
        if self.decode is not None:
            quantities |= {"decode": self.decode.quantity(), "decode_throughput": throughput(self.decode, self.batch)}
        return quantities


def speed(
    models: Mapping[str, nn.Module],
    inputs: Inputs,
    *,
    decode_tokens: int = 16,
    caches: Mapping[str, Callable[[], Any]] | None = None,
    repeats: int = 10,
    warmup: int = 2,
    threads: int | None = None,
    clock: str = "wall",
) -> dict[str, Speed]:
    """Time ``models`` against each other on the same ``inputs``, interleaved.

    ``inputs``: ``input_ids`` (B, T) and any other inputs of the models. Decoding is timed if all models keep a cache
    and ``decode_tokens`` > 0: that many greedy steps after the inputs, in seconds per step. ``caches`` maps a model's
    name to a function that makes an empty cache, used instead of the model's own (for example a StaticCache). Raises
    TautError for no models, and for padded inputs, because decoding them would need a mask.
    """
    if not models:
        raise TautError("models is empty; give at least one model to time")
    device = inputs["input_ids"].device
    settings = {"repeats": repeats, "warmup": warmup, "threads": threads, "clock": clock, "device": device}
    caches = caches or {}
    forward = compare({name: forward_case(model, inputs) for name, model in models.items()}, **settings)
    decode: dict[str, Timing] = {}
    if decode_tokens > 0 and all(keeps_cache(model, inputs) for model in models.values()):
        cases = {name: decode_case(model, inputs, decode_tokens, caches.get(name)) for name, model in models.items()}
        decode = {name: timing.per(decode_tokens) for name, timing in compare(cases, **settings).items()}
    batch, tokens = len(inputs["input_ids"]), inputs["input_ids"].numel()
    return {name: Speed(forward[name], tokens, decode.get(name), batch) for name in models}


def forward_case(model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    """A case of one forward pass without gradients; a decoder fills its cache."""

    @torch.no_grad()
    def run() -> Any:
        return model(**inputs)

    return run


def decode_case(model: nn.Module, inputs: Inputs, tokens: int, make_cache: Callable[[], Any] | None = None) -> Prepared:
    """A case of ``tokens`` greedy steps after ``inputs``; each run starts from a new copy of the same filled cache.

    Raises TautError for padded inputs and for a model without a cache.
    """
    mask = inputs.get("attention_mask")
    if mask is not None and not bool(mask.all()):
        raise TautError("decoding can only be timed on inputs without padding; give rows of one length")
    initial = {} if make_cache is None else {"past_key_values": make_cache()}
    output = _cached_forward(model, inputs, **initial)
    if output is None:
        raise TautError(f"{type(model).__name__} returns no past_key_values; decoding needs a model with a cache")
    filled, steps = output["past_key_values"], {}
    name = "input_ids"
    if "encoder_last_hidden_state" in output:
        name, steps["encoder_outputs"] = "decoder_input_ids", (output["encoder_last_hidden_state"],)
    first = _next(output, inputs[name])

    @torch.no_grad()
    def run(cache: Any) -> None:
        ids = first
        for _ in range(tokens):
            stepped = model(**{name: ids}, past_key_values=cache, use_cache=True, **steps)
            ids, cache = _next(stepped, ids), stepped["past_key_values"]

    return Prepared(lambda: copy.deepcopy(filled), run)


def keeps_cache(model: nn.Module, inputs: Inputs) -> bool:
    """Whether a forward pass of this model returns a key/value cache (decoders do, with or without a head)."""
    return _cached_forward(model, inputs) is not None


def filled_cache(model: nn.Module, inputs: Inputs) -> Any:
    """The key/value cache after one forward pass over ``inputs``; None for a model without one."""
    output = _cached_forward(model, inputs)
    return None if output is None else output["past_key_values"]


def throughput(timing: Timing, tokens: int) -> Quantity:
    """Tokens per second, if one call processes ``tokens`` tokens."""
    taken = timing.quantity()
    rates = tuple(tokens / sample for sample in timing.samples)
    low, high = (None if bound is None else tokens / bound for bound in (taken.high, taken.low))
    how = f"{tokens} tokens by the {taken.how}"
    return Quantity(value=tokens / timing.median, unit="tokens/s", how=how, samples=rates, low=low, high=high)


@torch.no_grad()
def _cached_forward(model: nn.Module, inputs: Inputs, **given: Any) -> Any:
    if "use_cache" not in inspect.signature(model.forward).parameters:
        return None
    output = model(**inputs, use_cache=True, **given)
    return output if output.get("past_key_values") is not None else None


def _next(output: Any, ids: Tensor) -> Tensor:
    """The next ids (B, 1): the greedy choice, or the last id again if the model has no head."""
    return output["logits"][:, -1:].argmax(-1) if "logits" in output else ids[:, -1:]
