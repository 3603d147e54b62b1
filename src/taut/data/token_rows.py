"""From texts to rows of token ids, as plain lists."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from taut.data.rows import sentences

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def text_rows(tokenizer: "PreTrainedTokenizerBase", texts: Iterable[str], length: int) -> list[list[int]]:
    """A row for each text, special tokens included, of at most ``length`` ids.

    A text that is too long is cut between sentences, and only a sentence that is too long is cut short. Texts of one
    token are left out: nothing can be predicted in them.
    """
    whole = [text for text in texts if text.strip()]
    rows: list[list[int]] = []
    for text, ids in zip(whole, _encoded(tokenizer, whole), strict=True):
        rows += [ids] if len(ids) <= length else _cut(tokenizer, text, length)
    bare = len(tokenizer("", add_special_tokens=True)["input_ids"])
    return [row for row in rows if len(row) > bare + 1]


def document_rows(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], length: int, *, pack: bool, whole: bool, framed: bool
) -> list[tuple[list[int], bool]]:
    """Rows of at most ``length`` ids to train a language model on, and whether each begins a text.

    With ``pack`` the texts follow each other with an end-of-text token between, and the last incomplete row is
    dropped. Otherwise every text begins a row; it has as many rows as it needs with ``whole``, else only the first.
    ``framed`` puts the tokenizer's special tokens at both ends of every row, as masked models expect.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    inner = length - (2 if framed else 0)
    if pack:
        stream = [token for ids in encoded for token in ([*ids, end] if end is not None else ids)]
        streams = [stream[: len(stream) // inner * inner]]
    else:
        streams = [[*ids, end] if end is not None and not framed else ids for ids in encoded if ids]
        streams = streams if whole else [ids[:inner] for ids in streams]
    rows = [(ids[at : at + inner], at == 0) for ids in streams for at in range(0, len(ids), inner)]
    if framed:
        rows = [([tokenizer.cls_token_id, *row, tokenizer.sep_token_id], first) for row, first in rows]
    return [(row, first) for row, first in rows if len(row) > 1]


def _encoded(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text. ``verbose=False`` turns off the tokenizer's warning about long texts, which are cut later."""
    return tokenizer(list(texts), add_special_tokens=True, verbose=False)["input_ids"] if texts else []


def _cut(tokenizer: "PreTrainedTokenizerBase", text: str, length: int) -> list[list[int]]:
    """Neighbouring sentences joined as long as they fit."""
    pieces: list[str] = []
    for sentence in sentences(text):
        joined = f"{pieces[-1]} {sentence}" if pieces else sentence
        fits = bool(pieces) and len(_encoded(tokenizer, [joined])[0]) <= length
        pieces = [*pieces[:-1], joined] if fits else [*pieces, sentence]
    return tokenizer(pieces, add_special_tokens=True, truncation=True, max_length=length)["input_ids"]
