"""``taut.context``: how much of their context the models of a group use (relative effective context length).

The measure is the one of Dai et al. 2019 (arXiv 1901.02860), appendix C; see ``evaluation/context_gain.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data as texts
from taut.core.errors import TautError
from taut.core.progress import Progress
from taut.core.table import Table
from taut.evaluation._encode import usable_length
from taut.evaluation._language import Tokens, last_logits, surprise, tokenize
from taut.evaluation.context_gain import EffectiveContext, effective_contexts
from taut.evaluation.task import kind
from taut.surgery.loading import Source, open_model, open_skeleton, open_tokenizer, resolve
from taut.surgery.modes import evaluating


@dataclass(frozen=True)
class Contexts:
    """The measured contexts of a group of models.

    ``found`` and ``losses`` are in the order of ``models``; ``losses`` are mean nats per token at each of ``contexts``.
    ``settings`` lists all that the numbers depend on: they hold only for this group, text and settings.
    """

    models: tuple[str, ...]
    contexts: tuple[int, ...]
    results: tuple[EffectiveContext, ...]
    losses: tuple[tuple[float, ...], ...]
    settings: dict[str, Any]

    def table(self) -> Table:
        """A row for each model, with its losses at the shortest and the longest context."""
        rows = []
        for name, effective, losses in zip(self.models, self.results, self.losses, strict=True):
            reached = f"{effective.tokens} or more" if effective.at_least else str(effective.tokens)
            between = f"{effective.low} to {effective.high}"
            rows.append((name, reached, between, f"{losses[0]:.4f}", f"{losses[-1]:.4f}"))
        ends = (f"nats at {self.contexts[0]}", f"nats at {self.contexts[-1]}")
        return Table(("model", "effective context", "95 % interval", *ends), rows)

    def __repr__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def to_dict(self) -> dict[str, Any]:
        """The results as one dictionary, for scripts."""
        rows = [
            {"model": name, **asdict(effective), "losses": list(losses)}
            for name, effective, losses in zip(self.models, self.results, self.losses, strict=True)
        ]
        return {"contexts": list(self.contexts), "models": rows, "settings": self.settings}


def context(
    models: Sequence[str | Path | PreTrainedModel],
    data: str = "python_topics",
    *,
    split: str | None = None,
    limit: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shortest: int = 64,
    step: int = 64,
    longest: int = 512,
    hardest: float = 0.1,
    threshold: float = 0.01,
    positions: int = 1000,
    batch_size: int = 32,
    cached: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Contexts:
    """The relative effective context length of each model within this group; see ``taut.context``."""
    if not models:
        raise TautError("context: give at least one model")
    numbers = {"shortest": shortest, "step": step, "positions": positions, "batch_size": batch_size}
    for name, number in (numbers | ({} if cached is None else {"cached": cached})).items():
        if number < 1:
            raise TautError(f"context: {name} = {number}: expected at least 1")
    contexts = tuple(range(shortest, longest + 1, step))
    if len(contexts) < 2 or contexts[-1] != longest:
        raise TautError(
            f"context: longest = {longest} is not reached from shortest = {shortest} in steps of {step}; "
            f"the nearest is {shortest + max(1, round((longest - shortest) / step)) * step}"
        )
    group = [_member(model, tokenizer) for model in models]
    source = texts.text(data, split, limit)
    tokens, begin = _same_tokens(group, source.rows[0][0])
    for member in group:
        member.check(longest)
    places = _spread(len(tokens.ids), longest, positions)
    per_model = len(contexts) * len(places)
    tables = []
    for index, member in enumerate(group):
        opened = member.open(device, dtype, seed)

        def report(done: int, before: int = index * per_model) -> None:
            if progress:
                progress(before + done, per_model * len(group))

        tables.append(losses_at(opened, tokens.ids, begin, contexts, places, batch_size, cached, report))
    losses = torch.stack(tables)
    names = tuple(member.name for member in group)
    settings = {
        "shortest": shortest,
        "step": step,
        "longest": longest,
        "hardest": hardest,
        "threshold": threshold,
        "positions": len(places),
        "opening": "BOS, one of the tokens of context" if begin else "none",
        "cached": cached,
        "seed": seed,
        "data": source.facts(len(places)),
        "group": list(names),
    }
    effective = effective_contexts(losses, contexts, hardest, threshold, seed)
    means = [tuple(row) for row in losses.mean(2).tolist()]
    return Contexts(names, contexts, tuple(effective), tuple(means), settings)


@torch.inference_mode()
def losses_at(
    model: PreTrainedModel,
    ids: Sequence[int],
    begin: tuple[int, ...],
    contexts: Sequence[int],
    places: Sequence[int],
    batch_size: int,
    cached: int | None,
    progress: Callable[[int], None],
) -> Tensor:
    """The losses of the tokens of ``ids`` at T ``places``, for each of C ``contexts``: (C, T) float64 nats.

    A context is the exact number of tokens before the scored one. ``begin`` stands first and counts among them.
    """
    table = torch.zeros(len(contexts), len(places), dtype=torch.float64)
    with evaluating(model):
        for row, length in enumerate(contexts):
            shown = length - len(begin)
            for start in range(0, len(places), batch_size):
                batch = places[start : start + batch_size]
                rows = [(*begin, *ids[place - shown : place]) for place in batch]
                scores = last_logits(model, rows, cached)
                table[row, start : start + len(batch)] = surprise(scores, [ids[place] for place in batch])
                progress(row * len(places) + start + len(batch))
    return table


@dataclass(frozen=True)
class _Member:
    """One model of the group. A model in a folder is not loaded yet."""

    name: str
    source: Source | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def open(self, device: str, dtype: torch.dtype | None, seed: int) -> PreTrainedModel:
        return open_model(self.source, dtype, device, seed) if isinstance(self.source, Source) else self.source

    def check(self, longest: int) -> None:
        """Raises TautError for a model that does not fit, before any model of the group is run."""
        described = open_skeleton(self.source) if isinstance(self.source, Source) else self.source
        output = kind(described)
        if output != "causal":
            raise TautError(f"context: {self.name} does not predict the next token ({output})")
        room = usable_length(described, self.tokenizer, longest)
        if room < longest:
            raise TautError(f"context: longest = {longest}: {self.name} reads at most {room} tokens")


def _member(model: str | Path | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> _Member:
    source = resolve(model) if isinstance(model, str | Path) else model
    own_tokenizer = tokenizer or (open_tokenizer(source) if isinstance(source, Source) else None)
    name = source.name if isinstance(source, Source) else type(source).__name__
    if own_tokenizer is None:
        raise TautError(f"context: {name} has no tokenizer; give tokenizer=")
    return _Member(name, source, own_tokenizer)


def _same_tokens(group: Sequence[_Member], text: str) -> tuple[Tokens, tuple[int, ...]]:
    """The tokens that all models see, and the ids that start every window.

    Raises TautError if two models tokenize the text differently.
    """
    seen = []
    for member in group:
        tokens, begin = tokenize(member.tokenizer, text), member.tokenizer.bos_token_id
        seen.append((tokens.ids, begin))
        if seen[-1] != seen[0]:
            raise TautError(
                f"context: {group[0].name} and {member.name} split this text into different tokens ({len(seen[0][0])} "
                f"and {len(tokens.ids)}, BOS {seen[0][1]} and {begin}); give models with the same tokenizer"
            )
    return tokens, () if begin is None else (begin,)


def _spread(count: int, longest: int, positions: int) -> list[int]:
    """At most ``positions`` evenly spread places among ``count`` tokens, each after at least ``longest`` tokens."""
    room = count - longest
    if room < 1:
        raise TautError(f"context: the text has {count} tokens; expected more than longest = {longest}")
    positions = min(positions, room)
    return [longest + index * room // positions for index in range(positions)]
