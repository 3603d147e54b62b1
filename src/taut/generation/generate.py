"""Continues a prompt with a decoder, piece by piece, and measures time and cache size."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from taut.core.errors import TautError
from taut.core.site import MemorySite
from taut.core.table import WIDTH, clip
from taut.generation.prefix import Prefix, check_length, empty_cache
from taut.surgery.apply import sites_of


@dataclass(frozen=True)
class Generated:
    """A generated text and its cost.

    ``text`` follows the prompt; ``ids`` (N,) are its tokens. ``first_seconds`` is the time to the first token,
    ``seconds`` the whole time. ``cache_bytes`` is the size of the keys and values stored at the end,
    ``full_cache_bytes`` their size in a cache that drops nothing.
    """

    text: str
    ids: Tensor
    prompt_tokens: int
    prefix_tokens: int
    first_seconds: float
    seconds: float
    cache_bytes: int
    full_cache_bytes: int

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of the tokens after the first; None if there was only one."""
        later = len(self.ids) - 1
        return later / (self.seconds - self.first_seconds) if later > 0 else None

    def __repr__(self) -> str:
        return f"{clip(f'Generated({self.text!r}')}\n{clip(f'  {self.sentence()}', WIDTH - 1)})"

    def to_dict(self) -> dict[str, Any]:
        """The result as a dictionary, for scripts."""
        numbers = {name: value for name, value in vars(self).items() if name != "ids"}
        return numbers | {"tokens": len(self.ids), "tokens_per_second": self.tokens_per_second}

    def sentence(self) -> str:
        """The result in one sentence, for people."""
        rate = f"{self.tokens_per_second:.1f} tokens/s, " if self.tokens_per_second else ""
        share = self.cache_bytes / self.full_cache_bytes
        before = f"{self.prefix_tokens} from the prefix + " if self.prefix_tokens else ""
        return (
            f"{len(self.ids)} tokens after {before}{self.prompt_tokens}, first after {self.first_seconds:.2f} s, {rate}"
            f"cache {self.cache_bytes:,} bytes: {share:.1%} of the {self.full_cache_bytes:,} of a full one"
        )


class _Pieces(TextStreamer):
    """Passes finished pieces of text on, and records the time of the first token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text
        self.first: float | None = None

    def put(self, value: Tensor) -> None:
        # The streamer receives the prompt first; it must not count as the first token.
        if not self.next_tokens_are_prompt and self.first is None:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    prefix: Prefix | None = None,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda piece: None,
) -> Generated:
    """Generate at most ``tokens`` tokens after ``prefix`` and ``prompt``.

    At ``temperature`` 0 each step takes the most likely token. ``on_text`` is called with each piece of text as soon as
    it is finished. Raises TautError for an empty prompt, a text longer than the model's positions, and a model that is
    no decoder.
    """
    cache = empty_cache(model) if prefix is None else prefix.cache()
    begins = prefix is None
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=begins).input_ids.to(model.device)
    if not prompt or not ids.shape[1]:
        raise TautError("the prompt is empty: give at least one token")
    earlier = 0 if prefix is None else len(prefix.ids)
    check_length(model, earlier + ids.shape[1] + tokens)
    pieces = _Pieces(tokenizer, on_text)
    chosen: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": tokens}
    if temperature > 0:
        torch.manual_seed(seed)
        chosen["temperature"] = temperature
    whole = ids if prefix is None else prefix.before(ids)
    started = time.perf_counter()
    output = model.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        past_key_values=cache,
        streamer=pieces,
        return_dict_in_generate=True,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **chosen,
    )
    seconds = time.perf_counter() - started
    new = output.sequences[0, whole.shape[1] :]
    cache = output.past_key_values
    cache_size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    site = next(site for site in sites_of(model) if isinstance(site, MemorySite))
    first = (pieces.first or time.perf_counter()) - started
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        ids=new,
        prompt_tokens=ids.shape[1],
        prefix_tokens=earlier,
        first_seconds=first,
        seconds=seconds,
        cache_bytes=cache_size,
        full_cache_bytes=site.entry_bytes * cache.get_seq_length(),
    )
