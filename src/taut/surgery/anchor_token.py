"""Adds an anchor token: the tokenizer writes it behind every sentence, and the model gets a row for it."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, normalizers
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from taut.core.errors import TautError
from taut.surgery.apply import copy_companions
from taut.surgery.folders import whole_folder
from taut.surgery.loading import Source

MEAN = "mean"


def add_anchor_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str, after: Sequence[str], start: str = MEAN
) -> PreTrainedTokenizerBase:
    """Add a row for ``token`` to ``model``, in place, and return a tokenizer that writes the token.

    The tokenizer writes it behind each of the strings ``after``, where white space or the end of the text follows. It
    is a special token, so decoding may skip it. ``start`` sets the first values of the row: ``mean`` of all rows, or a
    copy of the row of this token. An output map that is not tied gets its row the same way. Source: Pang et al. 2024,
    Anchor-based Large Language Models (arXiv 2402.07616), whose code puts the token into the text itself.

    Raises TautError for a token that exists already, a ``start`` that is not one token, an empty ``after``, and a
    tokenizer that is not a fast one or changes the token.
    """
    name = type(tokenizer).__name__
    if not tokenizer.is_fast:
        raise TautError(f"an anchor token needs a fast tokenizer (tokenizer.json), not {name}")
    if not after or not all(end.strip() for end in after):
        raise TautError(f"after = {list(after)}: name the strings behind which the token is written")
    vocabulary = tokenizer.get_vocab()
    if not token.strip() or token in vocabulary:
        raise TautError(
            f"token = {token!r}: expected a new one" + (", it is there already" if token in vocabulary else "")
        )
    copied = None if start == MEAN else _id_of(start, tokenizer)
    marked = _writing(tokenizer, token, after)
    index = marked.convert_tokens_to_ids(token)
    rows = model.get_input_embeddings().num_embeddings
    if index >= rows:
        model.resize_token_embeddings(index + 1, mean_resizing=False)
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    for table in {id(table.weight): table for table in tables if table is not None}.values():
        _begin(table, index, len(vocabulary), copied)
    return marked


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: Source, out: str | Path) -> Path:
    """Write a complete folder with the changed model and its tokenizer. It appears whole or not at all."""
    with whole_folder(out) as folder:
        if source.folder is not None:
            copy_companions(source.folder, folder)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return Path(out)


def _writing(tokenizer: PreTrainedTokenizerBase, token: str, after: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer like this one that also writes ``token``. Raises TautError if it changes the token."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    before = backend.normalizer
    if before is not None and (seen := before.normalize_str(token)) != token:
        raise TautError(f"token = {token!r}: this tokenizer reads it as {seen!r}: choose one that it leaves as it is")
    steps = [] if before is None else [before]
    for end in map(str.strip, after):
        steps.append(normalizers.Replace(Regex(re.escape(end) + r"(?=\s|$)"), end + token))
    backend.normalizer = normalizers.Sequence(steps)
    backend.add_special_tokens([AddedToken(token, normalized=True, special=True)])
    # The tokenizer class of a family would build its own normalizer again when it is opened.
    roles = copy.deepcopy(tokenizer.special_tokens_map)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        chat_template=tokenizer.chat_template,
        **roles,
    )


@torch.no_grad()
def _begin(table: nn.Module, index: int, rows: int, copied: int | None) -> None:
    """Fill row ``index`` of a table (V, D) or an output map: from row ``copied``, or the mean of the first ``rows``."""
    tensors = [table.weight] if getattr(table, "bias", None) is None else [table.weight, table.bias]
    for tensor in tensors:
        tensor[index] = tensor[:rows].float().mean(0).to(tensor.dtype) if copied is None else tensor[copied]


def _id_of(start: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token whose text is ``start``. Raises TautError if it is not one token."""
    index = tokenizer.convert_tokens_to_ids(start)
    if index is None or index == tokenizer.unk_token_id:
        pieces = tokenizer.encode(start, add_special_tokens=False)
        if len(pieces) != 1:
            raise TautError(
                f"start = {start!r} is not one token of this tokenizer but {tokenizer.tokenize(start)}: give one of "
                f"these, or {MEAN!r}"
            )
        index = pieces[0]
    return index
