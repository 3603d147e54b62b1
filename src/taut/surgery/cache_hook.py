"""Installs a memory method in a decoder: a hook before its forward pass that inserts our cache, and one after it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from taut.core.errors import TautError
from taut.core.site import MemorySite
from taut.methods.base import LEARNED, MemoryMethod
from taut.ops.attention.masks import Marked
from taut.ops.caches.base import Incoming, PositionedCache
from taut.surgery.attention import Serving, first_tokens, serving, switch


def install_memory(model: PreTrainedModel, method: MemoryMethod, site: MemorySite) -> Callable[[], None]:
    """Let the decoder at ``site.path`` use ``method``'s cache and pattern. Returns a function that undoes it."""
    if method.pattern() is None and method.cache(site.layers) is None:
        return lambda: None
    base = model.get_submodule(site.path)
    release = switch(model)
    before = base.register_forward_pre_hook(Memory(method, site.layers), with_kwargs=True, prepend=True)
    after = base.register_forward_hook(_finish, always_call=True)

    def undo() -> None:
        before.remove()
        after.remove()
        release()

    return undo


@dataclass(frozen=True)
class Memory:
    """The hook before a decoder's forward pass: it replaces an empty cache of transformers by one of ours."""

    method: MemoryMethod
    layers: int

    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        arguments = dict(kwargs)
        if args:
            arguments |= inspect.signature(base.forward).bind_partial(*args).arguments
        requested = self._requested(base, arguments.get("past_key_values"), arguments.get("use_cache"))
        cache = self._cache(base, arguments.get("past_key_values")) if requested or self.method.makes_keys else None
        if cache is not None:
            arguments["past_key_values"] = cache
        decoder_cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        positioned = decoder_cache if isinstance(decoder_cache, PositionedCache) else None
        pattern = self.method.pattern()
        marked = positioned is None and isinstance(pattern, Marked)
        incoming = self._incoming(base, arguments) if positioned is not None or marked else None
        if positioned is not None:
            if arguments.get("attention_mask") is None and positioned.starts is not None:
                raise TautError(
                    f"{self.method.id}: the cache holds left-padded rows: pass the attention_mask every time"
                )
            positioned.begin(incoming)
        marks = self.method.marks(incoming) if marked else None
        # Our cache rounds the entries that it stores. Without a cache, attention rounds them.
        store = self.method.store if cache is None else None
        serving.set(Serving(pattern, positioned, marks, store, handed_out=requested))
        return (), arguments

    def _incoming(self, base: nn.Module, arguments: dict[str, Any]) -> Incoming:
        """Describe the new tokens of this call. Raises TautError for a mask that is not (batch, length)."""
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        tokens = arguments.get("inputs_embeds") if ids is None else ids
        if mask is not None and mask.dim() != 2:
            raise TautError(f"{self.method.id}: give a (batch, length) attention_mask, not one of {mask.dim()} axes")
        queries = tokens.shape[1]
        real = None if mask is None or bool(mask[:, -queries:].all()) else mask[:, -queries:].bool()
        restarts = _restarts(arguments.get("position_ids"), mask)
        learned = dict(base.named_children()).get(LEARNED)
        return Incoming(queries, tokens.device, ids, real, first_tokens(mask), restarts, learned)

    def _requested(self, base: nn.Module, past: Cache | None, use_cache: bool | None) -> bool:
        """Whether the caller requests a cache: by passing one, or by ``use_cache``.

        Raises TautError for gradient checkpointing with a method that makes its own keys.
        """
        use_cache = base.config.use_cache if use_cache is None else use_cache
        checkpointing = base.training and getattr(base, "gradient_checkpointing", False)
        if checkpointing and self.method.makes_keys:
            raise TautError(f"{self.method.id}: gradient checkpointing would fill its cache twice; switch it off")
        return past is not None or bool(use_cache and not checkpointing)

    def _cache(self, base: nn.Module, past: Cache | None) -> Cache:
        """Return our cache for this call: a new one, or the one that the caller passed.

        Raises TautError for a cache of another type, and for one of transformers that already holds tokens.
        """
        if past is None:
            ours = self.method.cache(self.layers)
            return EncoderDecoderCache(ours, DynamicCache()) if base.config.is_encoder_decoder else ours
        passed = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
        ours = self.method.cache(self.layers)
        if type(passed) is type(ours):
            return past
        if type(passed) is not DynamicCache or not all(isinstance(layer, DynamicLayer) for layer in passed.layers):
            raise TautError(
                f"{self.method.id} uses its own cache: do not pass cache_implementation, or past_key_values of type "
                f"{type(passed).__name__}"
            )
        if passed.get_seq_length() > 0:
            raise TautError(
                f"{self.method.id}: past_key_values already holds {passed.get_seq_length()} tokens in another cache; "
                "start with an empty cache, or with none"
            )
        return EncoderDecoderCache(ours, past.cross_attention_cache) if isinstance(past, EncoderDecoderCache) else ours


def _restarts(positions: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """(B or 1, T) positions -> (B or 1, T) bool, True where a packed sequence begins; None if nothing is packed."""
    if positions is None or mask is not None or positions.dim() != 2 or positions.shape[1] < 2:
        return None
    first = torch.cat([torch.zeros_like(positions[:, :1], dtype=torch.bool), positions.diff() != 1], 1)
    return first if bool(first.any()) else None


def _finish(base: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The hook after a decoder's forward pass. It removes a cache that the caller did not request from the output."""
    memory = serving.get()
    if memory is not None and memory.cache is not None:
        memory.cache.finish()
    serving.set(None)
    if memory is None or memory.handed_out:
        return output
    if isinstance(output, ModelOutput):
        return type(output)(**{name: value for name, value in output.items() if name != "past_key_values"})
    return tuple(value for value in output if not isinstance(value, Cache)) if isinstance(output, tuple) else output
