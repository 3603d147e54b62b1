"""The whole cache in few bits."""

from typing import Literal

from pydantic import Field

from taut.core.site import MemorySite
from taut.methods.base import Knobs, MemoryMethod
from taut.methods.store import Store
from taut.ops.caches.quantized import StoredCache


class LowBitKnobs(Knobs):
    bits: Literal[8, 6, 4, 3, 2] = Field(8, description="bits of each number")
    group: int | None = Field(None, ge=2, description="how many numbers of a key or value share a scale; default: all")
    clip: bool = Field(False, description="search each scale for the least squared error; slows down every step")


class LowBit(MemoryMethod):
    """Stores all keys and values as integers. Each key and each value of each head has its own scales and biases.

    All of them, new ones too, are rounded before attention, so attention uses exactly what is stored. Passes without a
    cache round in the same way. For gradients the rounding is the identity.
    """

    id = "memory.low_bit"
    summary = "the whole cache in 8, 4 or fewer bits a number"
    source = (
        "Sheng et al. 2023, FlexGen (arXiv 2303.06865), group-wise quantised caches; Liu et al. 2024, KIVI (arXiv "
        "2402.02750). Changed: keys share scales within a token, as values do, where KIVI's share them along tokens; "
        "no recent tokens stay in full precision, so the result does not depend on where the text is cut"
    )
    Knobs = LowBitKnobs
    knobs: LowBitKnobs

    @property
    def store(self) -> Store:
        return Store(bits=self.knobs.bits, group=self.knobs.group, clip=self.knobs.clip)

    def cache(self, layers: int) -> StoredCache:
        return StoredCache(layers, self.store)

    def pattern(self) -> None:
        """Return None: all entries stay visible."""

    def entries(self, site: MemorySite) -> int:
        return site.length
