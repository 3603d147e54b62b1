"""A bounded cache that keeps the entries that received the most attention."""

from typing import Literal

from pydantic import Field

from taut.methods.memory._eviction import EvictionKnobs, EvictionMethod
from taut.ops.caches.eviction import AttentionMass


class AttentionScoreKnobs(EvictionKnobs):
    score: Literal["accumulated", "last"] = Field(
        "accumulated", description="attention summed over all queries so far (H2O), or that of the last query (TOVA)"
    )


class AttentionScore(EvictionMethod):
    """Each layer and key head keeps the ``entries`` that received the most attention.

    The latest ``recent`` of them are always kept. The default of ``recent`` is half of ``entries`` with accumulated
    scores, which new entries have had no time to gather, and 0 with the scores of the last query. Attention weights are
    computed a second time for this, some queries at a time.
    """

    id = "memory.attention_score"
    summary = "bounded; every head keeps the entries that received the most attention"
    source = (
        "Zhang et al. 2023, H2O (arXiv 2306.14048), and with score: last, Oren et al. 2024, TOVA (arXiv 2401.06104). "
        "Changed: a long prompt is scored and cut once, after its pass; attention is summed over the query heads "
        "that share a key head, where TOVA averages over all heads of a layer"
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
