"""Plugs taut into transformers: an attention function and a mask function, both registered as ``taut``."""

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
    PreTrainedModel,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from taut.core.errors import TautError
from taut.core.site import AttentionSite
from taut.methods.base import AttentionMethod
from taut.methods.store import Store
from taut.ops.attention import sdpa
from taut.ops.attention.masks import Pattern, View
from taut.ops.caches.base import PositionedCache
from taut.ops.caches.quantized import rounded

NAME = "taut"
METHOD = "taut_attention"
"""The attribute of an attention module that holds its method. Copies of the module keep it."""


@dataclass(frozen=True)
class Serving:
    """The memory in use during the current forward pass of a decoder.

    ``marks`` (B, T) are given if no cache holds them. ``store`` is given if no cache rounds the keys and values.
    ``handed_out`` is False if the caller did not request the cache.
    """

    pattern: Pattern | None
    cache: PositionedCache | None
    marks: Tensor | None = None
    store: Store | None = None
    handed_out: bool = True


serving: ContextVar[Serving | None] = ContextVar("serving", default=None)


def register() -> None:
    """Register ``taut`` as an attention implementation. Safe to call again.

    Without a mask function of the same name, transformers would silently ignore padding.
    """
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, view)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: View | Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function: run the module's method, or ``sdpa`` if it has none, with the mask that ``view`` made.

    Raises TautError for a method in a model that caps its attention scores.
    """
    method = vars(module).get(METHOD)
    seen = attention_mask if isinstance(attention_mask, View) else _from_tensor(module, query, key, attention_mask)
    seen = _packed(seen, options.get("position_ids"))
    if seen.key_positions is not None and "position_bias" in options:
        options["position_bias"] = _bias(module, seen)
    memory = serving.get() if seen.causal else None
    if memory is not None and memory.store is not None:
        key, value = rounded(key, memory.store), rounded(value, memory.store)
    if method is None:
        out = sdpa.attend(module, query, key, value, seen, **options)
    elif options.get("softcap") is not None:
        raise TautError(f"{method.id}: the model caps its attention scores (softcap), which fused kernels cannot do")
    else:
        supported = {name: options[name] for name in ("scaling", "dropout", "position_bias") if name in options}
        out = method.attend(module, query, key, value, seen, **supported).contiguous()
    if memory is not None and memory.cache is not None:
        scaling = options.get("scaling")
        memory.cache.attended(
            module.layer_idx, query, key, seen, query.shape[-1] ** -0.5 if scaling is None else scaling
        )
    return out, None


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
    """The mask function: describe the mask. The description becomes a tensor only when a kernel needs one.

    The arguments are those of transformers' ``sdpa_mask``. Of its callers, only those that make bidirectional masks
    pass ``allow_is_bidirectional_skip``. Raises TautError for a cache that drops entries in a model with its own mask
    function.
    """
    if isinstance(attention_mask, View):
        return attention_mask
    causal = allow_is_bidirectional_skip is None
    # A static cache counts tokens in a tensor, which changes before the mask is made.
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
    memory = serving.get() if causal else None
    cache = memory.cache if memory is not None else None
    positions = cache.key_positions if cache is not None else None
    marks = cache.marks if cache is not None else None
    if memory is not None and memory.marks is not None:
        marks = memory.marks, memory.marks
    starts = first_tokens(attention_mask)
    rule = None if mask_function in (causal_mask_function, bidirectional_mask_function) else mask_function
    if use_vmap:
        # A model's own mask function may not accept tensors of indices, so read the mask that it makes.
        if positions is not None:
            raise TautError("a cache that drops entries does not work with a model's own mask function")
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
        placed=cache is None or cache.placed,
        pattern=memory.pattern if memory is not None else None,
        marks=marks,
        rule=rule,
        dense_mask=make,
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
    """Give the attention modules at these paths their methods. Returns a function that undoes it."""
    modules = [model.get_submodule(path) for path in chosen]
    release = switch(model)
    for module, (method, _) in zip(modules, chosen.values(), strict=True):
        setattr(module, METHOD, method)

    def undo() -> None:
        for module in modules:
            delattr(module, METHOD)
        release()

    return undo


@dataclass
class _Claim:
    """How many installations need ``taut`` attention in a model, and each configuration's implementation before."""

    previous: list[tuple[Any, str | None]]
    count: int = 0


_claims: WeakKeyDictionary[PreTrainedModel, _Claim] = WeakKeyDictionary()


def switch(model: PreTrainedModel) -> Callable[[], None]:
    """Run ``model`` with ``taut`` attention. Returns a function that releases it.

    The previous implementation returns when every caller has released it. Raises TautError for a model without fused
    attention (sdpa), or whose attention implementation cannot be chosen.
    """
    register()
    if not model._supports_sdpa:
        raise TautError(
            f"{type(model).__name__} does not support fused attention (sdpa), which taut's attention and memory need"
        )
    if model not in _claims:
        models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
        configs = {id(submodel.config): submodel.config for submodel in models}
        previous = [(config, config._attn_implementation) for config in configs.values()]
        model.set_attn_implementation(NAME)
        if any(config._attn_implementation != NAME for config, _ in previous):
            _restore(previous)
            raise TautError(f"{type(model).__name__} does not let taut choose its attention implementation")
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


def _from_tensor(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> View:
    """Describe a mask tensor from the caller, (B or 1, 1, T, S) bool or float; None is no mask."""
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
        dense_mask=lambda: mask,
    )


def _packed(seen: View, positions: Tensor | None) -> View:
    """Add ``positions`` (B or 1, T) to the description of the mask, if they are those of packed sequences."""
    if positions is None or seen.rule is None or seen.padding is not None or positions.shape[-1] != seen.keys:
        return seen
    if "packed" not in seen.memo:
        restarts = positions.dim() == 2 and bool((positions.diff() != 1).any())
        seen.memo["packed"] = replace(seen, packed=positions, memo={}) if restarts else None
    return seen.memo["packed"] or seen


def _bias(module: nn.Module, seen: View) -> Tensor:
    """T5's position bias for a cache with gaps, (B or 1, H, T, S), from the true distances.

    The model would use columns of the cache as positions. Its first layer computes the bias for all layers.
    """
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
    """Whether each key of the view is a real token, (B, S) bool; None when all are."""
    if mask is None:
        return None
    if positions is not None:
        places = positions + (0 if starts is None else starts[:, None])
        seen = mask.gather(1, places.clamp(min=0).expand(mask.shape[0], -1)) | (positions < 0)
    else:
        seen = prepare_padding_mask(mask, keys, key_start)[:, key_start : key_start + keys]
    return None if bool(seen.all()) else seen
