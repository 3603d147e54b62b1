"""A bounded cache that keeps the entries which were attended to most."""

from typing import Literal

from pydantic import Field

from taut.methods.memory._eviction import EvictionKnobs, EvictionMethod
from taut.ops.caches.eviction import AttentionMass


class AttentionScoreKnobs(EvictionKnobs):
    score: Literal["accumulated", "last"] = Field(
        "accumulated", description="attention summed over all queries so far (H2O), or that of the last query (TOVA)"
    )


class AttentionScore(EvictionMethod):
    """Keeps in each layer and key head the ``entries`` that were given the most attention, and the latest ``recent`` in
    any case: half of them with accumulated scores, which newcomers do not have yet, none with those of the last query;
    unless given. Attention weights are computed once more for it, some queries at a time."""

    id = "memory.attention_score"
    summary = "bounded; every head keeps the entries that were attended to most"
    source = (
        "Zhang et al. 2023, H2O (arXiv 2306.14048), and with score: last, Oren et al. 2024, TOVA (arXiv 2401.06104). "
        "Changed: a long prompt is scored and cut once, after its pass; query heads that share a key head vote "
        "together, where TOVA averages over all heads of a layer"
    )
    Knobs = AttentionScoreKnobs
    knobs: AttentionScoreKnobs

    @property
    def score(self) -> AttentionMass:
        return AttentionMass(last=self.knobs.score == "last")

    @property
    def recent(self) -> int:
        if self.knobs.recent is not None:
            return self.knobs.recent
        return 0 if self.knobs.score == "last" else self.knobs.entries // 2
