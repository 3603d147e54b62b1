"""A cache that keeps only one entry of every closed segment: its anchor."""

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
        (), description="strings that end a segment, each a single token of the tokenizer; default: punctuation"
    )
    ids: tuple[int, ...] = Field((), description="the token ids of anchors; with strings, their ids")
    every: int | None = Field(None, ge=1, description="make every N-th token an anchor, instead of strings or ids")
    longest: int = Field(256, ge=0, description="a segment ends at this many tokens at the latest; 0: no limit")
    source_ends: tuple[str, ...] = Field(
        (), description="keep all tokens up to and including the first of these strings; empty: keep none"
    )
    source_ids: tuple[int, ...] = Field((), description="the token ids of source_ends")
    segment: int = Field(25, ge=1, description="tokens of a segment on average; used only to predict cost")
    store: CacheStore = Field(None, description="how keys and values are stored; default: in their own dtype")

    @field_validator("anchors", "source_ends", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return NAMED.get(given, (given,)) if isinstance(given, str) else given

    @model_validator(mode="before")
    @classmethod
    def _some_way(cls, given: Any) -> Any:
        """Use punctuation unless ``anchors``, ``ids`` or ``every`` is given."""
        ways = [name for name in ("anchors", "ids") if given.get(name)]
        if given.get("every") is not None and ways:
            raise ValueError(f"give every or {ways[0]}, not both")
        return given if ways or given.get("every") is not None else {**given, "anchors": "punctuation"}


class Anchor(MemoryMethod):
    """Keeps the open segment and the anchors of closed ones.

    Text is cut into segments, and the last token of each is its anchor. A token sees its own segment and all earlier
    anchors. An anchor sees only its own segment. So no later token attends to a closed segment except to its anchor.

    A model must be trained under this mask (``taut train`` with this recipe) to collect what matters in its anchors.
    Full forward passes, including those of training, use the same mask.
    """

    id = "memory.anchor"
    summary = "one entry for each closed segment; models are trained to collect in it what matters"
    source = (
        "Pang et al. 2024, Anchor-based Large Language Models (arXiv 2402.07616). Changed: tokens keep their true "
        "positions, where the published code renumbers them by their place in the cache; batches, beam search and "
        "prompts in pieces are supported; a segment that gets too long is closed; the first tokens may all be kept"
    )
    Knobs = AnchorKnobs
    knobs: AnchorKnobs

    def with_tokenizer(self, tokenizer: Callable[[], Any]) -> "Anchor":
        """Return this method with the ids of its strings. Raises TautError for a string that is not one token."""
        knobs = self.knobs
        pairs = {"ids": (knobs.ids, knobs.anchors), "source_ids": (knobs.source_ids, knobs.source_ends)}
        wanted = {name: strings for name, (ids, strings) in pairs.items() if strings and not ids}
        if not wanted or (opened := tokenizer()) is None:
            return self
        ids_by_knob = {name: _ids_of(strings, opened) for name, strings in wanted.items()}
        return Anchor(knobs.model_copy(update=ids_by_knob))

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
        """Count the anchors and an open segment, for segments of ``every`` or, on average, ``segment`` tokens. A source
        is not counted, because its length is unknown."""
        segment = self.knobs.every or self.knobs.segment
        return min(site.length, site.length // segment + segment)

    @property
    def anchoring(self) -> Anchoring:
        """Which tokens are anchors. Raises TautError if the ids of its strings are not set."""
        if (self.knobs.anchors and not self.knobs.ids) or (self.knobs.source_ends and not self.knobs.source_ids):
            raise TautError(f"{self.id}: its strings need a tokenizer: pass tokenizer= to apply, or give ids")
        return Anchoring(self.knobs.ids, self.knobs.every or self.knobs.longest, self.knobs.source_ids)


def _ids_of(strings: tuple[str, ...], tokenizer: Any) -> tuple[int, ...]:
    """List the ids of all tokens whose text is one of ``strings``, ignoring spaces around it.

    Raises TautError for a string that is not one token. Of a set from NAMED only one string must be.
    """
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
