"""Folders of tiny models with a tokenizer, as a user would have them."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from taut.contract.tiny import tiny


def tiny_folder(path: Path, family: str = "llama", head: str = "default", **overrides: object) -> Path:
    """A saved tiny model with a byte-level-like tokenizer of its vocabulary."""
    model: PreTrainedModel = tiny(family, head=head, **overrides)
    model.save_pretrained(path)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}
    words |= {chr(31 + index): index for index in range(5, model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        mask_token="<mask>",
        model_max_length=64,
    )
    fast.chat_template = "{{ messages[0]['content'] }}"
    fast.save_pretrained(path)
    return path
