"""Tiny random models of every family, with the same weights every time."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Cache, PreTrainedModel

VOCABULARY = 96
STANDARD_DEVIATION = 0.3


@dataclass(frozen=True)
class Family:
    """How to build one tiny model. ``table_scale`` multiplies the table, if the model itself shrinks the logits."""

    config: str
    arguments: dict[str, Any]
    default: str
    decoder: bool
    encoder_decoder: bool = False
    attention: str = "sdpa"
    table_scale: float = 1.0


ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}
DECODER = ENCODER | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "scale_embedding": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_inner": 64,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
NEOX = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
GEMMA = DECODER | {"head_dim": 8}
SLIDING = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

FAMILIES: dict[str, Family] = {
    "bert": Family("BertConfig", ENCODER | {"pad_token_id": 0}, "BertForMaskedLM", False),
    "roberta": Family("RobertaConfig", ENCODER | {"pad_token_id": 1}, "RobertaForMaskedLM", False),
    "distilbert": Family("DistilBertConfig", DISTILBERT, "DistilBertForMaskedLM", False),
    "gpt2": Family("GPT2Config", GPT2, "GPT2LMHeadModel", True),
    "gpt_neox": Family("GPTNeoXConfig", NEOX | {"tie_word_embeddings": False}, "GPTNeoXForCausalLM", True),
    "llama": Family("LlamaConfig", DECODER | {"tie_word_embeddings": True}, "LlamaForCausalLM", True),
    "llama_untied": Family("LlamaConfig", DECODER | {"tie_word_embeddings": False}, "LlamaForCausalLM", True),
    "mistral": Family("MistralConfig", DECODER | {"sliding_window": None}, "MistralForCausalLM", True),
    "qwen2": Family("Qwen2Config", DECODER | {"tie_word_embeddings": True}, "Qwen2ForCausalLM", True),
    "qwen3": Family("Qwen3Config", GEMMA | {"tie_word_embeddings": True}, "Qwen3ForCausalLM", True),
    "gemma": Family("GemmaConfig", GEMMA, "GemmaForCausalLM", True),
    # Gemma 2 caps its attention scores. sdpa cannot do this, so transformers refuses it.
    "gemma2": Family(
        "Gemma2Config",
        GEMMA | SLIDING | {"query_pre_attn_scalar": 8},
        "Gemma2ForCausalLM",
        True,
        attention="eager",
    ),
    "gemma3": Family("Gemma3TextConfig", GEMMA | SLIDING | {"query_pre_attn_scalar": 8}, "Gemma3ForCausalLM", True),
    "bart": Family("BartConfig", BART, "BartForConditionalGeneration", True, encoder_decoder=True),
    "t5": Family(
        "T5Config",
        T5 | {"feed_forward_proj": "relu"},
        "T5ForConditionalGeneration",
        True,
        encoder_decoder=True,
        table_scale=3.0,
    ),
    "t5_gated": Family(
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "T5ForConditionalGeneration",
        True,
        encoder_decoder=True,
    ),
}
REPRESENTATIVES = ("bert", "gpt2", "llama", "t5")


def tiny(
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    head: str = "default",
    device: str = "cpu",
    **overrides: Any,
) -> PreTrainedModel:
    """Build a small random model in evaluation mode, with attention "sdpa" (Gemma 2: "eager"); ``seed`` fixes it.

    ``head`` is ``default`` (the language-modelling head), ``base`` (AutoModel), or a transformers class name such as
    ``BertForSequenceClassification``. ``overrides`` change the configuration. ``device="meta"`` gives only shapes.
    """
    row = FAMILIES[family]
    config = getattr(transformers, row.config)(**(row.arguments | overrides))
    config._attn_implementation = row.attention
    name = row.default if head == "default" else head
    with torch.device(device):
        model = transformers.AutoModel.from_config(config) if head == "base" else getattr(transformers, name)(config)
    if device != "meta":
        _randomise(model, seed, row.table_scale)
    return model.to(dtype).eval()


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the model has a causal decoder (encoder-decoders do)."""
    return model.config.is_encoder_decoder or model.config.model_type not in ("bert", "roberta", "distilbert")


def inputs(model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Make random ids without special tokens and a mask of ones, (B, T) int64; also ``decoder_input_ids`` if needed.

    They are on the model's device, with the same values on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=generator).to(model.device)
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        decoded = torch.randint(5, model.config.vocab_size, (batch, length), generator=generator)
        tensors["decoder_input_ids"] = decoded.to(model.device)
    return tensors


def padded_inputs(
    model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0, pads: int = 4
) -> dict[str, Tensor]:
    """Make ``inputs`` whose last row has ``pads`` padding positions: on the left for decoders, else on the right."""
    tensors = inputs(model, batch, length, seed)
    left = is_decoder(model) and not model.config.is_encoder_decoder
    padded = slice(0, pads) if left else slice(length - pads, length)
    tensors["attention_mask"][-1, padded] = 0
    tensors["input_ids"][-1, padded] = model.config.pad_token_id or 0
    return tensors


def logits(model: PreTrainedModel, **batch: Tensor) -> Tensor:
    """Compute the logits (B, T, V) of a model with a head, else the last hidden state (B, T, D). No gradient."""
    with torch.no_grad():
        output = model(**batch)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def stepwise(
    model: PreTrainedModel, chunks: list[int], past: Cache | None = None, **batch: Tensor
) -> tuple[Tensor, Cache]:
    """Run a text through the model's cache, in chunks of these lengths. Returns the logits (B, T, V) and the cache."""
    key = "decoder_input_ids" if "decoder_input_ids" in batch else "input_ids"
    ids, places = batch.pop(key), batch.pop("position_ids", None)
    mask = batch.pop("attention_mask", None) if key == "input_ids" else None
    pieces, start = [], 0
    with torch.no_grad():
        for count in chunks:
            step = {key: ids[:, start : start + count]}
            if places is not None:
                step["position_ids"] = places[:, start : start + count]
            start += count
            if mask is not None:
                step["attention_mask"] = mask[:, :start]
            output = model(**batch, **step, past_key_values=past, use_cache=True)
            past = output["past_key_values"]
            pieces.append(output["logits"])
    return torch.cat(pieces, 1), past


@torch.no_grad()
def _randomise(model: PreTrainedModel, seed: int, table_scale: float) -> None:
    """Set Gaussian weights and small biases, shared tensors once. Norms stay near their start (one; zero in Gemma)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * STANDARD_DEVIATION
        if parameter.dim() > 1:
            parameter.copy_(noise)
        else:
            start = parameter if name.endswith("weight") else torch.zeros_like(parameter)
            parameter.copy_(start + noise / 4)
    model.get_input_embeddings().weight.mul_(table_scale)
