"""A small byte-level tokenizer trained on text that every Python has: any text, no unknown tokens, nothing fetched."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from taut import data

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
SIZE = 320
"""Ids 0 to SIZE - 1; give the tiny models ``vocab_size=SIZE``."""


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(data.text("python_topics", limit=50_000).column(0), trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, encoder: bool = False, begin: bool = True) -> PreTrainedTokenizerFast:
    """For an encoder every text stands between <s> and </s>, and there is a mask; ``begin`` gives a BOS token."""
    tokenizer = Tokenizer.from_str(_trained())
    if encoder:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    roles = {"pad_token": "<pad>", "eos_token": "</s>"}
    if encoder:
        roles |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    if begin:
        roles["bos_token"] = "<s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
