"""Semantic textual similarity: tests whether cosines rank pairs of sentences as people do."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field
from scipy.stats import rankdata, zscore
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.record import Score
from taut.evaluation._encode import encode
from taut.evaluation.task import Task, TaskOptions, reads_text


class StsOptions(TaskOptions):
    """Options of sts."""

    data: str = Field("stsb", description="stsb, sts12, sts13, sts14, or a file with two sentences and a score")
    columns: str | None = Field(None, description="SENTENCE1,SENTENCE2,SCORE by header or position; by default guessed")
    max_length: int = Field(128, ge=2, description="tokens kept of each sentence, special tokens included")


class Sts(Task):
    """Spearman's rank correlation between cosine and human score. Source: Cer et al. 2017, arXiv:1708.00055."""

    id = "sts"
    summary = "rank pairs of sentences by similarity as people do (Spearman)"
    Options: ClassVar[type[TaskOptions]] = StsOptions

    def fits(self, model: PreTrainedModel) -> str | None:
        return reads_text(model)

    def evaluated(self) -> data.Data:
        return data.scored_pairs(self.options.data, self.options.split, self.options.columns).head(self.options.limit)

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        pairs = self.evaluated()
        gold = [float(score) for score in pairs.column(2)]
        if len(set(gold)) < 2:
            raise TautError(f"task {self.id}: all {len(gold)} scores of {self.options.data} are equal; nothing to rank")
        first, second = pairs.column(0), pairs.column(1)
        # A sentence in several pairs is encoded only once.
        distinct = list(dict.fromkeys([*first, *second]))
        place = {sentence: index for index, sentence in enumerate(distinct)}
        vectors = encode(
            model,
            tokenizer,
            distinct,
            max_length=self.options.max_length,
            batch_size=self.options.batch_size,
            progress=progress,
        ).double()
        cosines = (vectors[[place[s] for s in first]] * vectors[[place[s] for s in second]]).sum(-1).tolist()
        sets = [(set(a.lower().split()), set(b.lower().split())) for a, b in zip(first, second, strict=True)]
        overlap = [len(a & b) / max(1, len(a | b)) for a, b in sets]
        closeness = [-abs(len(a) - len(b)) for a, b in zip(first, second, strict=True)]
        return (
            self.score(
                "spearman",
                "correlation",
                f"cosine of mean-pooled vectors, at most {self.options.max_length} tokens; samples: product of the "
                "standardised ranks of each pair; their mean is the correlation",
                rank_products(cosines, gold),
                "higher",
                pairs.facts(),
                {
                    "word_overlap": float(np.mean(rank_products(overlap, gold))),
                    "length_difference": float(np.mean(rank_products(closeness, gold))),
                },
            ),
        )


def rank_products(predicted: Sequence[float], gold: Sequence[float]) -> list[float]:
    """N predictions and N true scores -> N products of standardised ranks (ties share their mean rank).

    Their mean is Spearman's correlation. All are 0 if one side is constant, because it then has no order.
    """
    ranks = rankdata([predicted, gold], axis=1)
    if min(ranks.std(axis=1)) == 0:
        return [0.0] * len(gold)
    return zscore(ranks, axis=1).prod(axis=0).tolist()
