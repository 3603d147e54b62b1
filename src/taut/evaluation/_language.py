"""Windows over a running text, and the logits and losses of a language model at their tokens."""

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.core.errors import TautError

CACHED = (
    "feed this many tokens at a time through the cache, as generation does: for memories that choose what they keep"
)
"""The help text of a task's option ``cached``."""


@dataclass(frozen=True)
class Tokens:
    """A whole text as ids without special tokens.

    ``ends``: where each token ends in the text, in characters; None if the tokenizer does not record it.
    """

    text: str
    ids: list[int]
    ends: list[int] | None

    def bytes_between(self, first: int, last: int) -> int:
        """UTF-8 bytes of the tokens ``first`` to ``last`` (exclusive)."""
        start = self.ends[first - 1] if first else 0
        return len(self.text[start : self.ends[last - 1]].encode())


@dataclass(frozen=True)
class Window:
    """One sequence for the model.

    Only this window scores the tokens ``first`` to ``last`` (exclusive) of the text. They are the last ones of
    ``ids``, followed only by ``after`` closing special tokens.
    """

    ids: tuple[int, ...]
    first: int
    last: int
    after: int = 0

    @property
    def scored(self) -> slice:
        """Where the scored tokens lie in ``ids``."""
        stop = len(self.ids) - self.after
        return slice(stop - (self.last - self.first), stop)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokenize a text without special tokens. Raises TautError for a text of fewer than two tokens."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    ids = encoded["input_ids"]
    if len(ids) < 2:
        raise TautError(f"the text has {len(ids)} tokens; expected at least 2")
    if not tokenizer.is_fast:
        return Tokens(text, ids, None)
    ends: list[int] = []
    for _, end in encoded["offset_mapping"]:
        ends.append(max(end, ends[-1] if ends else 0))
    # Whitespace at the very end may belong to no token, but it is part of the text.
    ends[-1] = len(text)
    return Tokens(text, ids, ends)


def causal_windows(tokens: Tokens, begin: int | None, length: int, stride: int | None) -> list[Window]:
    """Cut a text into windows of ``length`` ids that start ``stride`` tokens apart (None: half a window).

    Each window scores the tokens that no earlier window has scored. Every window starts with ``begin`` (the BOS id),
    as in training. If ``begin`` is None, the first token of the text has no context and is not scored. Only the last
    window can be shorter. Raises TautError for a stride that leaves gaps.
    """
    opening = () if begin is None else (begin,)
    room = length - len(opening)
    step = max(1, room // 2) if stride is None else stride
    if not 1 <= step <= room:
        raise TautError(f"stride = {stride} is out of range: 1 to {room}, the tokens of text in a window of {length}")
    windows: list[Window] = []
    first, start = 1 - len(opening), 0
    while first < len(tokens.ids):
        last = min(start + room, len(tokens.ids))
        windows.append(Window((*opening, *tokens.ids[start:last]), first, last))
        first, start = last, start + step
    return windows


def masked_windows(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Window]:
    """Cut a text into adjacent windows, each between the tokenizer's special tokens.

    Raises TautError if the tokenizer has no mask token, or if ``length`` leaves no room for text.
    """
    if tokenizer.mask_token_id is None:
        raise TautError("the tokenizer has no mask token; a masked language model needs one")
    opening = tuple(key for key in (tokenizer.cls_token_id,) if key is not None)
    closing = tuple(key for key in (tokenizer.sep_token_id,) if key is not None)
    room = length - len(opening) - len(closing)
    if room < 1:
        raise TautError(f"max_length = {length} leaves no room for text beside the special tokens")
    return [
        Window((*opening, *tokens.ids[start : start + room], *closing), start, start + len(piece), len(closing))
        for start in range(0, len(tokens.ids), room)
        for piece in [tokens.ids[start : start + room]]
    ]


def same_length_batches(windows: Sequence[Window], size: int) -> Iterator[list[int]]:
    """Indices of windows in order, in batches of at most ``size`` windows of equal length, so nothing needs padding."""
    batch: list[int] = []
    for index, window in enumerate(windows):
        if batch and (len(batch) == size or len(window.ids) != len(windows[batch[0]].ids)):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def logits(model: PreTrainedModel, rows: Sequence[Sequence[int]], cached: int | None = None) -> Tensor:
    """B rows of T ids -> logits (B, T, V) in the model's dtype.

    Takes one pass without a cache, which would cost memory and serve no purpose. With ``cached``, feeds that many
    tokens at a time through the cache, as generation does.
    """
    pieces = list(_passes(model, rows, cached, {}))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def last_logits(model: PreTrainedModel, rows: Sequence[Sequence[int]], cached: int | None = None) -> Tensor:
    """B rows of T ids -> (B, V): the logits of the last token, as ``logits`` gives them.

    The logits of the other tokens are not computed if the model offers that.
    """
    parameters = inspect.signature(model.forward).parameters
    options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
    return deque(_passes(model, rows, cached, options), maxlen=1)[0][:, -1]


def _passes(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], cached: int | None, inputs: dict[str, Any]
) -> Iterator[Tensor]:
    """The logits of every pass over B rows, (B, tokens of the pass, V)."""
    table = torch.tensor(rows, device=model.device)
    if cached is None:
        inputs = inputs | ({"use_cache": False} if model.can_generate() else {})
        yield model(input_ids=table, **inputs).logits
        return
    past = None
    for piece in table.split(cached, dim=1):
        answer = model(input_ids=piece, past_key_values=past, use_cache=True, **inputs)
        past = answer.past_key_values
        yield answer.logits


def surprise(scores: Tensor, targets: Sequence[int]) -> Tensor:
    """(N, V) logits, N ids -> (N,) float64 negative log-likelihoods in nats, computed from float32 logits."""
    wanted = torch.tensor(targets, device=scores.device)
    return nn.functional.cross_entropy(scores.float(), wanted, reduction="none").double().cpu()
