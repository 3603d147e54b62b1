"""Reproducible batches of model inputs from texts."""

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut.architectures.positions import position_limit
from taut.core.errors import TautError
from taut.data.token_rows import text_rows
from taut.healing.losses import IGNORED

POOL = 16
"""The number of batches that are sorted by length together. It limits padding, and the order stays random."""
MASKED = 0.15
"""The share of tokens hidden from a masked language model, as in its own training."""


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    model: PreTrainedModel,
    *,
    size: int = 32,
    length: int = 64,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Make model inputs on the CPU: ``size`` texts of similar length, padded on the right, with an ``attention_mask``.

    Every text is in one batch; the order depends only on ``seed``. Encoder-decoders get the same tokens on both sides.
    For masked language models some tokens are hidden, and ``labels`` holds them. Raises TautError for less text than
    one batch.
    """
    rows = text_rows(tokenizer, texts, min(length, tokenizer.model_max_length, position_limit(model.config) or length))
    if len(rows) < size:
        raise TautError(f"too little text: {len(rows)} texts of two tokens or more, but a batch needs {size}")
    order = random.Random(seed)
    order.shuffle(rows)
    chunks: list[list[list[int]]] = []
    for start in range(0, len(rows), size * POOL):
        pool = sorted(rows[start : start + size * POOL], key=len)
        chunks += [pool[at : at + size] for at in range(0, len(pool), size)]
    order.shuffle(chunks)
    padding = tokenizer.pad_token_id or 0
    batches = [_padded(chunk, padding) for chunk in chunks]
    if model.config.is_encoder_decoder:
        for batch in batches:
            batch |= {"decoder_input_ids": batch["input_ids"], "decoder_attention_mask": batch["attention_mask"]}
    elif tokenizer.mask_token_id is not None and predicts_masked(model):
        generator = torch.Generator().manual_seed(seed)
        for batch in batches:
            hidden = torch.rand(batch["input_ids"].shape, generator=generator) < MASKED
            hidden &= batch["attention_mask"].bool()
            batch["labels"] = batch["input_ids"].masked_fill(~hidden, IGNORED)
            batch["input_ids"] = batch["input_ids"].masked_fill(hidden, tokenizer.mask_token_id)
    return batches


def next_tokens(ids: Tensor, real: Tensor) -> Tensor:
    """(B, T) ids and which are real -> (B, T) labels of a causal model: at each position the next token."""
    labels = ids.masked_fill(~real, IGNORED).roll(-1, dims=1)
    labels[:, -1] = IGNORED
    return labels


def predicts_masked(model: PreTrainedModel) -> bool:
    """Whether the model predicts masked tokens, by the name of its class."""
    return type(model).__name__.endswith("ForMaskedLM")


def _padded(rows: Sequence[Sequence[int]], padding: int) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
