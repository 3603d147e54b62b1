"""Text given to a decoder in pieces, for tests of memories."""

from collections.abc import Callable

from transformers import Cache, EncoderDecoderCache, PreTrainedModel

from taut.architectures.locate import locate
from taut.contract.tiny import FAMILIES
from taut.core.site import MemorySite
from taut.methods.base import LEARNED, MemoryMethod
from taut.surgery.cache_hook import install_memory

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
