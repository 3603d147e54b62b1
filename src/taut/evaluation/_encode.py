"""Turns texts into vectors: pooled hidden states, computed in batches of similar length."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.architectures.positions import position_limit
from taut.core.progress import Progress


def encode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int,
    batch_size: int,
    progress: Progress,
    done: int = 0,
    total: int | None = None,
    normalise: bool = True,
    pooling: str = "mean",
) -> Tensor:
    """Encode N texts as vectors (N, D), float32 on the CPU, in the given order.

    Each vector pools the last hidden states of the real tokens with one of ``POOLINGS``. The default is their mean
    (Reimers & Gurevych 2019, arXiv:1908.10084). Vectors have unit length unless ``normalise`` is False. ``progress``
    starts counting at ``done``; its total is ``total``, by default N.
    """
    ids = token_ids(tokenizer, texts, usable_length(model, tokenizer, max_length))
    vectors: Tensor | None = None
    with torch.inference_mode():
        for indices in batches([len(row) for row in ids], batch_size):
            hidden, mask = states(model, tokenizer, [ids[index] for index in indices])
            pooled = POOLINGS[pooling](hidden, mask)
            if vectors is None:
                vectors = torch.zeros(len(texts), pooled.shape[1])
            vectors[indices] = (nn.functional.normalize(pooled, dim=-1) if normalise else pooled).cpu()
            done += len(indices)
            progress(done, total or len(texts))
    return torch.zeros(0, 0) if vectors is None else vectors


def usable_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: int) -> int:
    """The number of tokens that a sequence may have: ``wanted``, or less if the tokenizer or the positions limit it."""
    return min(wanted, tokenizer.model_max_length, position_limit(model.config) or wanted)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> list[list[int]]:
    """The ids of each text with special tokens: at most ``length``, and at least one, so that every text has a mean."""
    spare = tokenizer.eos_token_id or tokenizer.pad_token_id or 0
    encoded = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"] if texts else []
    return [row or [spare] for row in encoded]


def batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of ``size``, longest sequences first: so the first batch shows whether the memory suffices."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad B lists of ids on the right: ids (B, T) and mask (B, T), both int64.

    The tokenizer does not do it because it may have no padding token. Which id stands at a masked position does not
    matter.
    """
    length = max(len(row) for row in ids)
    filler = tokenizer.pad_token_id or 0
    table = torch.tensor([row + [filler] * (length - len(row)) for row in ids], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=device)
    return table, mask


def states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Sequence[list[int]]
) -> tuple[Tensor, Tensor]:
    """Run B lists of ids: last hidden states (B, T, D) float32 and mask (B, T).

    For an encoder-decoder model these are the states of the encoder.
    """
    table, mask = padded(tokenizer, ids, model.device)
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    return body(input_ids=table, attention_mask=mask).last_hidden_state.float(), mask


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D), (B, T) -> (B, D): the mean over the real tokens. Padding may hold any value, even infinity."""
    real = mask.unsqueeze(-1).bool()
    return hidden.masked_fill(~real, 0.0).sum(1) / real.sum(1)


def pool_first(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D), (B, T) -> (B, D): the state of the first token, which an encoder's own classifier uses."""
    return hidden[:, 0]


def pool_last(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D), (B, T) -> (B, D): the state of the last real token. Padding is on the right."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]


def pool_greatest(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, D), (B, T) -> (B, D): the maximum of each dimension over the real tokens."""
    return hidden.masked_fill(~mask.unsqueeze(-1).bool(), -torch.inf).amax(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": pool,
    "cls": pool_first,
    "lasttoken": pool_last,
    "max": pool_greatest,
}
"""The ways to pool states into one vector per text, under the names that sentence-transformers uses."""
