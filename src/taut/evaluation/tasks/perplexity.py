"""Measures how well a language model predicts a text, per token and per byte."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.progress import Progress
from taut.core.record import Score
from taut.evaluation._encode import usable_length
from taut.evaluation._language import (
    CACHED,
    Window,
    causal_windows,
    logits,
    masked_windows,
    same_length_batches,
    surprise,
    tokenize,
)
from taut.evaluation.task import Task, TaskOptions, kind

CHARACTERS = {"causal": 100_000, "masked": 2_000}
"""Characters of text to read if no limit is given. A masked model needs one pass per token."""


class PerplexityOptions(TaskOptions):
    """Options of perplexity."""

    data: str = Field("python_topics", description="running text")
    limit: int | None = Field(
        None, ge=1, description="number of characters, from the start of the text; by default 100,000 (masked: 2,000)"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="windows run at once; does not change the score")
    stride: int | None = Field(
        None, ge=1, description="tokens between the starts of two windows; by default half a window"
    )
    cached: int | None = Field(None, ge=1, description=CACHED)
    together: int = Field(1, ge=1, description="tokens masked in one pass; 1 is the published pseudo-perplexity")


class Perplexity(Task):
    """Perplexity of causal models, pseudo-perplexity of masked models.

    Causal models: the exponential of the mean negative log-likelihood per token, and bits per UTF-8 byte, which can be
    compared between tokenizers. Masked models: pseudo-perplexity, with each token masked in turn (Salazar et al. 2020,
    arXiv:1910.14659). It is not a probability of the text and can only be compared with other pseudo-perplexities.
    """

    id = "perplexity"
    summary = "how well a language model predicts a text: per token, bits per byte; pseudo-perplexity for masked ones"
    Options: ClassVar[type[TaskOptions]] = PerplexityOptions

    def fits(self, model: PreTrainedModel) -> str | None:
        output = kind(model)
        if output in CHARACTERS:
            return None
        wanted = "load it with a causal or masked language-modelling head"
        return f"{type(model).__name__} has no such head ({output}); {wanted}"

    def evaluated(self) -> data.Data:
        return data.paragraphs(self.options.data, self.options.split, self.options.limit or max(CHARACTERS.values()))

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        causal = kind(model) == "causal"
        limit = self.options.limit or CHARACTERS[kind(model)]
        source = data.text(self.options.data, self.options.split, limit)
        tokens = tokenize(tokenizer, source.rows[0][0])
        length = usable_length(model, tokenizer, self.options.max_length)
        if causal:
            windows = causal_windows(tokens, tokenizer.bos_token_id, length, self.options.stride)
            nats = self._causal(model, windows, progress)
        else:
            windows = masked_windows(tokens, tokenizer, length)
            nats = self._masked(model, tokenizer.mask_token_id, windows, progress)
        counts = [window.last - window.first for window in windows]
        scored = tokens.ids[windows[0].first :]
        vocabulary = model.config.get_text_config().vocab_size
        unknown = 0 if tokenizer.unk_token_id is None else scored.count(tokenizer.unk_token_id)
        how = f"windows of {length} ids, {self._manner(tokenizer, causal)}, {len(scored)} tokens scored"
        how += f", {unknown} of them unknown to the tokenizer" if unknown else ""
        facts = source.facts(len(windows))
        baselines = {"unigram": unigram(scored, vocabulary), "uniform": math.log(vocabulary)}
        scores = [
            self.score(
                "perplexity_per_token" if causal else "pseudo_perplexity_per_token",
                "perplexity per token",
                f"{how}; samples: nats of each window / mean number of tokens in one; their mean is the "
                "logarithm of the value",
                shares(nats, counts),
                "lower",
                facts,
                {name: math.exp(value) for name, value in baselines.items()},
                math.exp(sum(nats) / len(scored)),
            )
        ]
        if causal and tokens.ends is not None:
            sizes = [tokens.bytes_between(window.first, window.last) for window in windows]
            scale = len(scored) / sum(sizes) / math.log(2)
            scores.append(
                self.score(
                    "bits_per_byte",
                    "bits per byte",
                    f"{how}, {sum(sizes)} bytes; samples: bits of each window / mean number of bytes in one",
                    shares([value / math.log(2) for value in nats], sizes),
                    "lower",
                    facts,
                    {name: value * scale for name, value in baselines.items()},
                )
            )
        return tuple(scores)

    def _manner(self, tokenizer: PreTrainedTokenizerBase, causal: bool) -> str:
        if not causal:
            return f"{self.options.together} masked at a time"
        opening = "no BOS, first token not scored" if tokenizer.bos_token_id is None else "BOS first"
        cached = f", {self.options.cached} at a time through the cache" if self.options.cached else ""
        return f"stride {self.options.stride or 'half a window'}, {opening}{cached}"

    @torch.inference_mode()
    def _causal(self, model: PreTrainedModel, windows: Sequence[Window], progress: Progress) -> list[float]:
        """The sum of nats of the scored tokens, for each window."""
        nats: list[float] = []
        for batch in same_length_batches(windows, self.options.batch_size):
            rows = [windows[index].ids for index in batch]
            for row, index in zip(logits(model, rows, self.options.cached), batch, strict=True):
                scored = windows[index].scored
                targets = windows[index].ids[scored]
                nats.append(float(surprise(row[scored.start - 1 : scored.stop - 1], targets).sum()))
            progress(len(nats), len(windows))
        return nats

    @torch.inference_mode()
    def _masked(self, model: PreTrainedModel, mask: int, windows: Sequence[Window], progress: Progress) -> list[float]:
        """The sum of nats of the tokens, for each window; each token is predicted while it is masked."""
        nats: list[float] = []
        for window in windows:
            places = range(*window.scored.indices(len(window.ids)))
            passes = math.ceil(len(places) / self.options.together)
            total = 0.0
            for start in range(0, passes, self.options.batch_size):
                # Tokens masked together are as far apart as possible.
                hidden = [places[turn::passes] for turn in range(start, min(start + self.options.batch_size, passes))]
                rows = [[mask if at in holes else key for at, key in enumerate(window.ids)] for holes in hidden]
                for row, holes in zip(logits(model, rows), hidden, strict=True):
                    total += float(surprise(row[list(holes)], [window.ids[at] for at in holes]).sum())
            nats.append(total)
            progress(len(nats), len(windows))
        return nats


def shares(amounts: Sequence[float], counts: Sequence[int]) -> list[float]:
    """Divide amounts by the mean count, so that their mean is the sum of amounts divided by the sum of counts."""
    return [amount * len(counts) / sum(counts) for amount in amounts]


def unigram(ids: Sequence[int], vocabulary: int) -> float:
    """Nats per token of a model that knows only the token frequencies of this text; each count is raised by one."""
    counts = Counter(ids)
    total = len(ids) + max(vocabulary, len(counts))
    return -sum(count * math.log((count + 1) / total) for count in counts.values()) / len(ids)
