"""The plug into transformers' attention: one registered function and one registered mask, both named ``taut``."""

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from taut.core.errors import TautError
from taut.core.site import AttentionSite, MemorySite
from taut.kernels import stock
from taut.kernels.cache import PositionedCache
from taut.kernels.patterns import Pattern, View
from taut.methods.part import AttentionMethod, MemoryMethod

NAME = "taut"
METHOD = "taut_attention"
"""The attribute of an attention module that holds its method: it follows the module into copies."""


@dataclass(frozen=True)
class Serving:
    """The memory at work in the decoder that is running now."""

    pattern: Pattern | None
    cache: PositionedCache | None


_serving: ContextVar[Serving | None] = ContextVar("serving", default=None)


def register() -> None:
    """Make ``taut`` known as an attention implementation. Without a mask function of the same name transformers would
    ignore padding, silently. Safe to call again."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, view)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: View | Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function: the module's method under the view that ``view`` made, else what ``sdpa`` does."""
    method = vars(module).get(METHOD)
    seen = attention_mask if isinstance(attention_mask, View) else _given(module, query, key, attention_mask)
    seen = _packed(seen, options.get("position_ids"))
    if seen.key_positions is not None and "position_bias" in options:
        options["position_bias"] = _bias(module, seen)
    if method is None:
        return stock.attend(module, query, key, value, seen, **options), None
    if options.get("softcap") is not None:
        raise TautError(f"{method.id}: the model caps its attention scores (softcap), which fused kernels cannot do")
    known = {name: options[name] for name in ("scaling", "dropout", "position_bias") if name in options}
    return method.attend(module, query, key, value, seen, **known).contiguous(), None


def view(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | View | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **others: Any,
) -> View:
    """The mask function: a description of the mask, which becomes a tensor only where a kernel asks for one.

    Arguments as transformers' ``sdpa_mask``; of its makers only the bidirectional ones name
    ``allow_is_bidirectional_skip``.
    """
    if isinstance(attention_mask, View):
        return attention_mask
    causal = allow_is_bidirectional_skip is None
    # A static cache counts in a tensor that moves on before the mask is made.
    q_offset = int(q_offset)
    make = partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=bool(allow_is_bidirectional_skip),
        use_vmap=use_vmap,
        device=device,
        **others,
    )
    serving = _serving.get() if causal else None
    positions = serving.cache.key_positions if serving is not None and serving.cache is not None else None
    starts = first_tokens(attention_mask)
    rule = None if mask_function in (causal_mask_function, bidirectional_mask_function) else mask_function
    if use_vmap:
        # A mask function of the caller's own need not take tensors of indices: read its answers.
        if positions is not None:
            raise TautError("a cache that drops entries does not go with a mask function of the model's own")
        rule = partial(_looked_up, make(), q_offset, kv_offset)
    return View(
        batch=batch_size,
        queries=q_length,
        keys=kv_length if positions is None else positions.shape[1],
        query_start=q_offset,
        key_start=kv_offset,
        causal=causal,
        padding=_padding(attention_mask, kv_length, kv_offset, positions, starts),
        starts=starts,
        key_positions=positions,
        pattern=serving.pattern if serving is not None else None,
        rule=rule,
        stock=make,
    )


def first_tokens(attention_mask: Tensor | None) -> Tensor | None:
    """(B, n) mask -> (B,) positions of the rows' first real tokens, None when all are 0."""
    if attention_mask is None:
        return None
    starts = attention_mask.int().argmax(1)
    return starts if bool(starts.any()) else None


def install_attention(
    model: PreTrainedModel, chosen: Mapping[str, tuple[AttentionMethod, AttentionSite]]
) -> Callable[[], None]:
    """Give the attention modules at these paths their methods; returns what takes them out again."""
    modules = [model.get_submodule(path) for path in chosen]
    release = _switch(model)
    for module, (method, _) in zip(modules, chosen.values(), strict=True):
        setattr(module, METHOD, method)

    def undo() -> None:
        for module in modules:
            delattr(module, METHOD)
        release()

    return undo


def install_memory(model: PreTrainedModel, method: MemoryMethod, site: MemorySite) -> Callable[[], None]:
    """Let the decoder at ``site.path`` use ``method``'s cache and pattern; returns what takes them out again."""
    if method.pattern() is None and method.cache(site.layers) is None:
        return lambda: None
    base = model.get_submodule(site.path)
    release = _switch(model)
    before = base.register_forward_pre_hook(Memory(method, site.layers), with_kwargs=True, prepend=True)
    after = base.register_forward_hook(_finish, always_call=True)

    def undo() -> None:
        before.remove()
        after.remove()
        release()

    return undo


@dataclass(frozen=True)
class Memory:
    """The hook before a decoder's forward: an empty stock cache becomes one of ours."""

    method: MemoryMethod
    layers: int

    def __call__(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        given = {**inspect.signature(base.forward).bind_partial(*args).arguments, **kwargs}
        cache = self._cache(base, given.get("past_key_values"), given.get("use_cache"))
        if cache is not None:
            given["past_key_values"] = cache
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        positioned = own if isinstance(own, PositionedCache) else None
        if positioned is not None:
            tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
            mask = given.get("attention_mask")
            if mask is not None and mask.dim() != 2:
                raise TautError(
                    f"{self.method.id}: give a (batch, length) attention_mask, not one of {mask.dim()} axes"
                )
            if mask is None and positioned.starts is not None:
                raise TautError(
                    f"{self.method.id}: the cache holds left-padded rows: pass the attention_mask every time"
                )
            positioned.begin(tokens.shape[1], first_tokens(mask), tokens.device)
        _serving.set(Serving(self.method.pattern(), positioned))
        return (), given

    def _cache(self, base: nn.Module, given: Cache | None, use_cache: bool | None) -> Cache | None:
        """The cache for this call: ours, new or handed back, or None where the model keeps none."""
        if given is None:
            use_cache = base.config.use_cache if use_cache is None else use_cache
            training = base.training and getattr(base, "gradient_checkpointing", False)
            if not use_cache or training:
                return None
            ours = self.method.cache(self.layers)
            return EncoderDecoderCache(ours, DynamicCache()) if base.config.is_encoder_decoder else ours
        own = given.self_attention_cache if isinstance(given, EncoderDecoderCache) else given
        ours = self.method.cache(self.layers)
        if type(own) is type(ours):
            return given
        if type(own) is not DynamicCache or not all(isinstance(layer, DynamicLayer) for layer in own.layers):
            raise TautError(
                f"{self.method.id} brings its own cache: drop cache_implementation, or past_key_values of type "
                f"{type(own).__name__}"
            )
        if own.get_seq_length() > 0:
            raise TautError(
                f"{self.method.id}: past_key_values already holds {own.get_seq_length()} tokens in a stock cache; "
                "start with an empty one, or with none"
            )
        return (
            EncoderDecoderCache(ours, given.cross_attention_cache) if isinstance(given, EncoderDecoderCache) else ours
        )


def _finish(base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """The hook after a decoder's forward."""
    serving = _serving.get()
    if serving is not None and serving.cache is not None:
        serving.cache.finish()
    _serving.set(None)


@dataclass
class _Claim:
    """How many installations need the ``taut`` implementation in a model, and what each configuration said before."""

    previous: list[tuple[Any, str | None]]
    count: int = 0


_claims: WeakKeyDictionary[PreTrainedModel, _Claim] = WeakKeyDictionary()


def _switch(model: PreTrainedModel) -> Callable[[], None]:
    """Run ``model`` on the ``taut`` implementation until every caller has called back."""
    register()
    if not model._supports_sdpa:
        raise TautError(
            f"{type(model).__name__} does not support fused attention (sdpa), which taut's attention and memory need"
        )
    if model not in _claims:
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        configs = {id(each.config): each.config for each in models}
        previous = [(config, config._attn_implementation) for config in configs.values()]
        model.set_attn_implementation(NAME)
        if any(config._attn_implementation != NAME for config, _ in previous):
            _restore(previous)
            raise TautError(f"{type(model).__name__} does not let its attention implementation be chosen")
        _claims[model] = _Claim(previous)
    _claims[model].count += 1

    def release() -> None:
        claim = _claims[model]
        claim.count -= 1
        if claim.count == 0:
            _restore(claim.previous)
            del _claims[model]

    return release


def _restore(previous: list[tuple[Any, str | None]]) -> None:
    for config, implementation in previous:
        config._attn_implementation = implementation


def _given(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> View:
    """A view of a mask that the caller made, (B or 1, 1, T, S) bool or float, or of none at all."""
    rule = None
    if mask is not None:
        seen = mask if mask.dtype == torch.bool else mask >= 0
        rule = partial(_looked_up, seen, key.shape[2] - query.shape[2], 0)
    return View(
        batch=query.shape[0],
        queries=query.shape[2],
        keys=key.shape[2],
        query_start=key.shape[2] - query.shape[2],
        causal=bool(getattr(module, "is_causal", True)),
        rule=rule,
        stock=lambda: mask,
    )


def _packed(seen: View, positions: Tensor | None) -> View:
    """``seen`` with the positions of packed sequences, (B or 1, T), if that is what they are."""
    if positions is None or seen.rule is None or seen.padding is not None or positions.shape[-1] != seen.keys:
        return seen
    if "packed" not in seen.memo:
        restarts = positions.dim() == 2 and bool((positions.diff() != 1).any())
        seen.memo["packed"] = replace(seen, packed=positions, memo={}) if restarts else None
    return seen.memo["packed"] or seen


def _bias(module: nn.Module, seen: View) -> Tensor:
    """T5's bias where the cache has gaps, (B or 1, H, T, S). The model takes places in the cache for positions, and its
    first layer computes the bias for all: so here, from the true distances."""
    if module.has_relative_attention_bias:
        table = module.relative_attention_bias
        buckets = module._relative_position_bucket(
            seen.distances(table.weight.device),
            bidirectional=False,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        seen.memo["bias"] = table(buckets).permute(0, 3, 1, 2)
    return seen.memo["bias"]


def _looked_up(
    mask: Tensor, query_start: int, key_start: int, batch: Tensor, head: Tensor, query: Tensor, key: Tensor
) -> Tensor:
    """A rule that reads a (B or 1, 1, T, S) bool mask."""
    return mask[batch % mask.shape[0], head, query - query_start, key - key_start]


def _padding(
    mask: Tensor | None, keys: int, key_start: int, positions: Tensor | None, starts: Tensor | None
) -> Tensor | None:
    """(B, S) bool, True = real, of the keys in sight; None when all are."""
    if mask is None:
        return None
    if positions is not None:
        places = positions + (0 if starts is None else starts[:, None])
        seen = mask.gather(1, places.clamp(min=0).expand(mask.shape[0], -1)) | (positions < 0)
    else:
        seen = prepare_padding_mask(mask, keys, key_start)[:, key_start : key_start + keys]
    return None if bool(seen.all()) else seen
