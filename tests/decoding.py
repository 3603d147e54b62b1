"""Text given to a decoder in pieces, for tests of memories."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from taut.anatomy.locate import locate
from taut.contract.tiny import FAMILIES
from taut.core.site import MemorySite
from taut.methods.method import LEARNED, MemoryMethod
from taut.surgery.memory import install_memory

DECODERS = [name for name, family in FAMILIES.items() if family.attention == "sdpa" and family.decoder]
LENGTH = 24
CHUNKS = {
    "one by one": [1] * LENGTH,
    "long prompt": [14] + [1] * 10,
    "growing": [3] + [1] * 21,
    "in pieces": [3, 1, 1, 7, 1, 2, 9],
}


def install(model: PreTrainedModel, method: MemoryMethod) -> Callable[[], None]:
    """Give the model this memory; returns what takes it out again."""
    site = next(site for site in locate(model).sites if isinstance(site, MemorySite))
    base, undo = model.get_submodule(site.path), install_memory(model, method, site)
    learned = method.learned(site, model.device, model.dtype)
    if learned is None:
        return undo
    base.add_module(LEARNED, learned)

    def remove() -> None:
        delattr(base, LEARNED)
        undo()

    return remove


def own(cache: Cache) -> Cache:
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def stepwise(model: PreTrainedModel, chunks: list[int], past: Cache | None = None, **given: Tensor) -> tuple:
    """Logits of all steps together, and the cache."""
    key = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    ids, places = given.pop(key), given.pop("position_ids", None)
    mask = given.pop("attention_mask", None) if key == "input_ids" else None
    pieces, start = [], 0
    with torch.no_grad():
        for count in chunks:
            step = {key: ids[:, start : start + count]}
            if places is not None:
                step["position_ids"] = places[:, start : start + count]
            start += count
            if mask is not None:
                step["attention_mask"] = mask[:, :start]
            output = model(**given, **step, past_key_values=past, use_cache=True)
            past = output["past_key_values"]
            pieces.append(output["logits"])
    return torch.cat(pieces, 1), past
