"""Inverse cloze on Python's own reference pages: find the passage that a sentence was cut out of."""

import math
from collections import Counter
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.record import Score
from taut.evaluation._encode import encode
from taut.evaluation.task import Task, TaskOptions, reads_text

PAIRS = 450
SHORTEST_PASSAGE = 30
SHORTEST_QUERY = 6
LEAST_LEFT = 10
"""Minimum numbers of words: in a passage before the cut, in a query sentence, in a passage after the cut."""
CODE_SIGNS = ("::=", ">>>", "+--", "|")
DEPTH = 10


class DocsRetrievalOptions(TaskOptions):
    """Options of docs_retrieval."""

    data: str = Field("python_topics", description="running text with blank lines between its paragraphs")
    limit: int | None = Field(PAIRS, ge=2, description="number of pairs of a sentence and its passage")


class DocsRetrieval(Task):
    """Ranks passages for a sentence by the cosine of mean-pooled vectors.

    The text depends on the Python version. The record holds the version and the hash of the text: compare results only
    within one version. Source of the task: Lee et al. 2019, arXiv:1906.00300 (inverse cloze).
    """

    id = "docs_retrieval"
    summary = "find the passage that a sentence was cut out of, in Python's reference pages (MRR@10, recall@1)"
    Options: ClassVar[type[TaskOptions]] = DocsRetrievalOptions

    def fits(self, model: PreTrainedModel) -> str | None:
        return reads_text(model)

    def evaluated(self) -> data.Data:
        return self.pairs()

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        pairs = self.pairs()
        count = len(pairs.rows)
        vectors = encode(
            model,
            tokenizer,
            [*pairs.column(0), *pairs.column(1)],
            max_length=self.options.max_length,
            batch_size=self.options.batch_size,
            progress=progress,
        ).double()
        ranks = ranks_of_own(vectors[:count] @ vectors[count:].T)
        lexical = ranks_of_own(okapi(pairs.column(0), pairs.column(1)))
        harmonic = sum(1 / rank for rank in range(1, min(DEPTH, count) + 1))
        how = f"cosine of mean-pooled vectors, {count} passages, at most {self.options.max_length} tokens"
        return (
            self.score(
                f"mrr_at_{DEPTH}",
                "mean reciprocal rank",
                f"{how}; samples: reciprocal rank of each sentence's passage, 0 below rank {DEPTH}",
                reciprocal(ranks),
                "higher",
                pairs.facts(),
                {"random": harmonic / count, "bm25": sum(reciprocal(lexical)) / count},
            ),
            self.score(
                "recall_at_1",
                "share",
                f"{how}; samples: 1 if the passage ranked first, else 0",
                [float(rank == 1) for rank in ranks],
                "higher",
                pairs.facts(),
                {"random": 1 / count, "bm25": sum(rank == 1 for rank in lexical) / count},
            ),
        )

    def pairs(self) -> data.Data:
        """Rows (sentence, passage without it) in hashed order. Raises TautError if the text has fewer than two."""
        paragraphs = data.paragraphs(self.options.data, self.options.split)
        rows = (cut(paragraph) for paragraph in dict.fromkeys(paragraphs.column(0)))
        pairs = data.Data(paragraphs.source, paragraphs.split, data.hashed([row for row in rows if row])).head(
            self.options.limit
        )
        if len(pairs.rows) < 2:
            raise TautError(
                f"task {self.id}: data {self.options.data} has {len(pairs.rows)} usable passages; expected at least 2 "
                f"paragraphs of {SHORTEST_PASSAGE} words or more with blank lines between them"
            )
        return pairs


def cut(paragraph: str) -> tuple[str, str] | None:
    """Split a paragraph into its longest sentence and the rest. None for code, tables and short paragraphs."""
    letters = sum(sign.isalpha() or sign == " " for sign in paragraph)
    if any(sign in paragraph for sign in CODE_SIGNS) or letters < 0.85 * len(paragraph):
        return None
    parts = data.sentences(paragraph)
    lengths = [len(part.split()) for part in parts]
    longest = lengths.index(max(lengths))
    enough = sum(lengths) >= SHORTEST_PASSAGE and sum(lengths) - lengths[longest] >= LEAST_LEFT
    if not enough or sorted(lengths)[-2:][0] < SHORTEST_QUERY:
        return None
    return parts[longest], " ".join(parts[:longest] + parts[longest + 1 :])


def ranks_of_own(scores: torch.Tensor) -> list[int]:
    """(N, N) scores of queries against passages -> the rank of passage i for query i, from 1; a tie ranks it lower."""
    return (scores >= scores.diagonal().unsqueeze(1)).sum(1).tolist()


def reciprocal(ranks: list[int]) -> list[float]:
    """1 / rank for ranks up to ``DEPTH``, else 0."""
    return [1 / rank if rank <= DEPTH else 0.0 for rank in ranks]


def okapi(
    queries: list[str], passages: list[str], saturation: float = 1.2, length_weight: float = 0.75
) -> torch.Tensor:
    """BM25 scores (queries, passages), float64, on lower-cased words. Source: Robertson & Zaragoza 2009."""
    counts = [Counter(words(passage)) for passage in passages]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(lengths)
    documents_with = Counter(word for count in counts for word in count)
    scores = torch.zeros(len(queries), len(passages), dtype=torch.float64)
    for column, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        norm = saturation * (1 - length_weight + length_weight * length / mean)
        weight = {
            word: math.log(1 + (len(passages) - documents_with[word] + 0.5) / (documents_with[word] + 0.5))
            * times * (saturation + 1) / (times + norm)
            for word, times in count.items()
        }  # fmt: skip
        for row, query in enumerate(queries):
            scores[row, column] = sum(weight.get(word, 0.0) for word in words(query))
    return scores


def words(sentence: str) -> list[str]:
    """The lower-cased runs of letters and digits in a sentence."""
    return "".join(sign if sign.isalnum() else " " for sign in sentence.lower()).split()
