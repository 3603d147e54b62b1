"""The tokenizer of a training run: the checkpoint's own, a given one, bytes, or one trained on the text."""

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from taut.core.errors import TautError
from taut.surgery.loading import Source, open_tokenizer, resolve

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
FRAME = {"cls_token": "<s>", "sep_token": "</s>"}
LEAST = len(SPECIAL) + 256
"""The size of the least vocabulary: the special tokens and all bytes."""


def make_tokenizer(
    choice: str | None, source: Source, texts: Iterable[str], framed: bool, cache: Path
) -> PreTrainedTokenizerBase:
    """Open the tokenizer that ``choice`` names, or make it. A new one is saved in ``cache`` and opened from there.

    ``framed`` puts every text between two special tokens, as masked models expect. Raises TautError if there is no
    tokenizer where ``choice`` (or the model, without a choice) should have one, and for a vocabulary below ``LEAST``.
    """
    if choice is None:
        tokenizer = open_tokenizer(source)
        if tokenizer is None:
            raise TautError(f"{source.name}: no tokenizer there; give tokenizer: a folder, bytes, or bpe:4096")
        return tokenizer
    size = _size(choice)
    if size is None:
        tokenizer = AutoTokenizer.from_pretrained(choice) if _is_tokenizer(choice) else open_tokenizer(resolve(choice))
        if tokenizer is None:
            raise TautError(f"tokenizer = {choice!r}: no tokenizer there")
        return tokenizer
    if not cache.is_dir():
        # Renamed only when it is complete, because the process may be killed at any time.
        partial = cache.with_name(f"{cache.name}.new")
        byte_level(size, texts, framed).save_pretrained(partial)
        partial.replace(cache)
    return AutoTokenizer.from_pretrained(cache)


def byte_level(size: int, texts: Iterable[str], framed: bool = False) -> PreTrainedTokenizerFast:
    """Train byte-pair encoding of ``size`` entries over bytes (Sennrich et al. 2016, as in GPT-2) on ``texts``.

    It encodes any text without unknown tokens. With ``LEAST`` entries nothing is trained, and a token is a byte.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts if size > LEAST else (), trainer)
    if framed:
        ends = [(token, tokenizer.token_to_id(token)) for token in FRAME.values()]
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, **(FRAME if framed else {}))


def _size(choice: str) -> int | None:
    """The size of a vocabulary to make; None for an existing tokenizer."""
    if choice == "bytes":
        return LEAST
    if not choice.startswith("bpe:"):
        return None
    number = choice.removeprefix("bpe:")
    if not re.fullmatch(r"\d+", number) or int(number) < LEAST:
        raise TautError(f"tokenizer = {choice!r}: expected a vocabulary of at least {LEAST}, such as bpe:4096")
    return int(number)


def _is_tokenizer(choice: str) -> bool:
    """Whether a folder holds a tokenizer and no model."""
    folder = Path(choice)
    return (folder / "tokenizer_config.json").is_file() and not (folder / "config.json").is_file()
