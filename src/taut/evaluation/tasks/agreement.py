"""Measures how far a changed model departs from the original model on the same text."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.record import Score
from taut.evaluation._encode import batches, pool, states, token_ids, usable_length
from taut.evaluation._language import Window, causal_windows, logits, masked_windows, same_length_batches, tokenize
from taut.evaluation.task import Task, TaskOptions, kind, reads_text

MASK_EVERY = 7
"""One token in this many is masked: close to the share used to train masked models."""


class AgreementOptions(TaskOptions):
    """Options of agreement."""

    data: str = Field("python_topics", description="running text")
    limit: int | None = Field(20_000, ge=1, description="number of characters, from the start of the text")
    batch_size: int = Field(8, ge=1, le=4096, description="sequences run at once; does not change the score")
    max_length: int = Field(128, ge=2, description="ids per window, special tokens included")


class Agreement(Task):
    """Compares a changed model with its original.

    Language models: the Kullback-Leibler divergence of the changed model from the original, and how often both rank the
    same token first (masked models: at masked tokens). Other models: cosines between their hidden states and between
    their pooled vectors. A model agrees with itself exactly: 0 nats, and a share and cosines of 1.
    """

    id = "agreement"
    needs_reference = True
    summary = "how far a model departs from its original: divergence and top-1 agreement, or cosines"
    Options: ClassVar[type[TaskOptions]] = AgreementOptions

    def fits(self, model: PreTrainedModel) -> str | None:
        return reads_text(model)

    def evaluated(self) -> data.Data:
        return data.paragraphs(self.options.data, self.options.split, self.options.limit)

    def scores(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        progress: Progress,
        reference: PreTrainedModel | None,
    ) -> tuple[Score, ...]:
        if reference is None:
            raise TautError(f"task {self.id}: needs the original model to compare with; pass it as reference")
        if kind(reference) != kind(model):
            raise TautError(f"task {self.id}: the reference gives {kind(reference)}, the model {kind(model)}")
        length = usable_length(model, tokenizer, self.options.max_length)
        if kind(model) in ("causal", "masked"):
            return self._language(model, tokenizer, progress, reference, length)
        return self._vectors(model, tokenizer, progress, reference, length)

    @torch.inference_mode()
    def _language(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        reference: PreTrainedModel,
        length: int,
    ) -> tuple[Score, ...]:
        source = data.text(self.options.data, self.options.split, self.options.limit)
        tokens = tokenize(tokenizer, source.rows[0][0])
        causal = kind(model) == "causal"
        if causal:
            room = length - (tokenizer.bos_token_id is not None)
            windows = causal_windows(tokens, tokenizer.bos_token_id, length, room)
        else:
            windows = masked_windows(tokens, tokenizer, length)
        divergences: list[Tensor] = []
        agreements: list[Tensor] = []
        for batch in same_length_batches(windows, self.options.batch_size):
            rows = [windows[i].ids if causal else _with_holes(windows[i], tokenizer.mask_token_id) for i in batch]
            places = [_predicted(windows[i]) if causal else _holes(windows[i]) for i in batch]
            original, variant = logits(reference, rows), logits(model, rows)
            if original.shape != variant.shape:
                raise TautError(
                    f"task {self.id}: the reference has {original.shape[-1]} tokens, the model {variant.shape[-1]}"
                )
            for i, place in enumerate(places):
                divergences.append(divergence(original[i, place], variant[i, place]))
                agreements.append((original[i, place].argmax(-1) == variant[i, place].argmax(-1)).double())
            progress(len(divergences), len(windows))
        where = "every next token" if causal else f"one masked token in {MASK_EVERY}"
        how = f"adjacent windows of {length} ids, {where}; samples: sum over a window / mean number of tokens in one"
        facts = source.facts(len(windows))
        return (
            self._score("kl_to_original", "nats per token", how, divergences, "lower", facts),
            self._score("top1_agreement", "share", how, agreements, "higher", facts),
        )

    def _score(
        self,
        metric: str,
        unit: str,
        how: str,
        windows: Sequence[Tensor],
        better: Literal["higher", "lower"],
        facts: dict[str, str],
    ) -> Score:
        """The score is the mean over all positions; the samples are scaled so that their mean equals it."""
        sums, positions = [float(window.sum()) for window in windows], sum(len(window) for window in windows)
        samples = [amount * len(windows) / positions for amount in sums]
        return self.score(metric, unit, how, samples, better, facts, value=sum(sums) / positions)

    @torch.inference_mode()
    def _vectors(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        progress: Progress,
        reference: PreTrainedModel,
        length: int,
    ) -> tuple[Score, ...]:
        source = self.evaluated()
        ids = token_ids(tokenizer, source.column(0), length)
        pooled, token = [0.0] * len(ids), [0.0] * len(ids)
        done = 0
        for batch in batches([len(row) for row in ids], self.options.batch_size):
            rows = [ids[index] for index in batch]
            (original, mask), (variant, _) = states(reference, tokenizer, rows), states(model, tokenizer, rows)
            if original.shape != variant.shape:
                raise TautError(
                    f"task {self.id}: the reference has width {original.shape[-1]}, the model {variant.shape[-1]}"
                )
            whole = cosine(pool(original, mask), pool(variant, mask)).tolist()
            single = pool(cosine(original, variant).unsqueeze(-1), mask).squeeze(-1).tolist()
            for at, index in enumerate(batch):
                pooled[index], token[index] = whole[at], single[at]
            done += len(batch)
            progress(done, len(ids))
        how = f"paragraphs of at most {length} tokens; samples: one per paragraph"
        facts = source.facts()
        return (
            self.score("pooled_cosine", "cosine", how, pooled, "higher", facts),
            self.score("state_cosine", "cosine", f"{how}, the mean over its tokens", token, "higher", facts),
        )


def divergence(original: Tensor, variant: Tensor) -> Tensor:
    """(N, V) logits of both models -> (N,) float64 KL(original || variant) in nats; exactly 0 for equal logits."""
    p, q = original.double().log_softmax(-1), variant.double().log_softmax(-1)
    # A token with probability 0 in the original adds nothing, whatever its probability in the variant.
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    return terms.sum(-1).cpu()


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """(..., D), (..., D) -> (...) float64: the cosine.

    The divisor is the root of the product of squared norms, not the product of roots: this gives exactly 1 for equal
    vectors.
    """
    first, second = first.double(), second.double()
    return (first * second).sum(-1) / ((first * first).sum(-1) * (second * second).sum(-1)).sqrt()


def _predicted(window: Window) -> list[int]:
    """The places where a causal model predicts the scored tokens: one before each token."""
    return list(range(window.scored.start - 1, window.scored.stop - 1))


def _holes(window: Window) -> list[int]:
    """The places to mask: every seventh, from the middle of the first seven; in a shorter window the last place."""
    places = list(range(*window.scored.indices(len(window.ids))))
    return places[MASK_EVERY // 2 :: MASK_EVERY] or places[-1:]


def _with_holes(window: Window, mask: int) -> list[int]:
    holes = set(_holes(window))
    return [mask if at in holes else key for at, key in enumerate(window.ids)]
