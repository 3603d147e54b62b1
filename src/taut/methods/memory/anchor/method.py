"""A cache that keeps one entry of every closed segment: its anchor."""

from collections.abc import Callable
from typing import Any

from pydantic import Field, field_validator, model_validator

from taut.core.errors import TautError
from taut.core.site import MemorySite
from taut.methods.base import Knobs, MemoryMethod
from taut.methods.memory.anchor.cache import AnchorCache, Anchoring, Segments
from taut.methods.store import CacheStore, Store

NAMED = {"punctuation": (".", "!", "?")}


class AnchorKnobs(Knobs):
    anchors: tuple[str, ...] = Field(
        (), description="strings that end a segment, each one token of the tokenizer; none at all: punctuation"
    )
    ids: tuple[int, ...] = Field((), description="the token ids of anchors; where strings are given, theirs")
    every: int | None = Field(None, ge=1, description="an anchor every so many tokens, instead of strings or ids")
    longest: int = Field(256, ge=0, description="a segment of so many tokens ends there; 0: however long it gets")
    source_ends: tuple[str, ...] = Field(
        (), description="all up to the first of these strings is kept whole; empty: nothing is"
    )
    source_ids: tuple[int, ...] = Field((), description="the token ids of source_ends")
    segment: int = Field(25, ge=1, description="tokens of a segment on average; for predictions of cost alone")
    store: CacheStore = Field(None, description="keep keys and values in few bits")

    @field_validator("anchors", "source_ends", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return NAMED.get(given, (given,)) if isinstance(given, str) else given

    @model_validator(mode="before")
    @classmethod
    def _some_way(cls, given: Any) -> Any:
        """Punctuation unless something else is said."""
        ways = [name for name in ("anchors", "ids") if given.get(name)]
        if given.get("every") is not None and ways:
            raise ValueError(f"give every or {ways[0]}, not both")
        return given if ways or given.get("every") is not None else {**given, "anchors": "punctuation"}


class Anchor(MemoryMethod):
    """Text is cut into segments, each of which ends with an anchor. A token sees its own segment and the anchors before
    it; an anchor sees its own segment alone; so nothing of a closed segment but its anchor is ever looked at again.

    A model has to be trained under this mask (``taut train`` with this recipe) to put what matters into its anchors.
    Full forward passes, training among them, use the same mask.
    """

    id = "memory.anchor"
    summary = "one entry for each closed segment; models are trained to put into it what matters"
    source = (
        "Pang et al. 2024, Anchor-based Large Language Models (arXiv 2402.07616). Changed: tokens keep their true "
        "positions, where the published code renumbers them by places in the cache; batches, beams, prompts in pieces; "
        "a segment that never ends is closed at a bound; the first tokens may be kept whole"
    )
    Knobs = AnchorKnobs
    knobs: AnchorKnobs

    def with_tokenizer(self, tokenizer: Callable[[], Any]) -> "Anchor":
        """With the ids of its strings. Raises TautError for a string that is not one token."""
        knobs = self.knobs
        pairs = {"ids": (knobs.ids, knobs.anchors), "source_ids": (knobs.source_ids, knobs.source_ends)}
        wanted = {name: strings for name, (ids, strings) in pairs.items() if strings and not ids}
        if not wanted or (known := tokenizer()) is None:
            return self
        found = {name: _ids_of(strings, known) for name, strings in wanted.items()}
        return Anchor(knobs.model_copy(update=found))

    @property
    def store(self) -> Store | None:
        return self.knobs.store

    def cache(self, layers: int) -> AnchorCache:
        return AnchorCache(layers, self.anchoring, self.knobs.store)

    def pattern(self) -> Segments:
        return Segments()

    def marks(self, incoming: Any) -> Any:
        return self.anchoring.marks(incoming, self.anchoring.start(incoming))[0]

    def entries(self, site: MemorySite) -> int:
        """Anchors and an open segment, when segments have ``every`` or, on average, ``segment`` tokens; a source, whose
        length nobody knows, not counted."""
        segment = self.knobs.every or self.knobs.segment
        return min(site.length, site.length // segment + segment)

    @property
    def anchoring(self) -> Anchoring:
        """Raises TautError while nobody has looked its strings up."""
        if (self.knobs.anchors and not self.knobs.ids) or (self.knobs.source_ends and not self.knobs.source_ids):
            raise TautError(f"{self.id}: its strings need a tokenizer: apply with tokenizer=, or give ids")
        return Anchoring(self.knobs.ids, self.knobs.every or self.knobs.longest, self.knobs.source_ids)


def _ids_of(strings: tuple[str, ...], tokenizer: Any) -> tuple[int, ...]:
    """The ids of all tokens that read as one of ``strings``, spaces around them aside. Of a named set those that the
    vocabulary has, at least one; of others each must be there."""
    texts: dict[str, list[int]] = {}
    for index in range(len(tokenizer)):
        texts.setdefault(tokenizer.decode([index]).strip(), []).append(index)
    wanted = [string.strip() for string in strings]
    missing = [string for string in wanted if not string or string not in texts]
    if missing and (strings not in NAMED.values() or len(missing) == len(wanted)):
        pieces = ", ".join(repr(piece) for piece in tokenizer.tokenize(missing[0]))
        raise TautError(
            f"memory.anchor: {missing[0]!r} is not one token of this tokenizer but {pieces or 'none'}: choose one of "
            "these, or add the string to the tokenizer's vocabulary"
        )
    return tuple(sorted({index for string in wanted for index in texts.get(string, ())}))
