"""Transformer families as data. To add a family, add one row to FAMILIES, keyed by ``config.model_type``.

Every path is the dotted name of a module. Paths of a family start at the base model (``AutoModel``). Paths of a stack
start at one of its layers, except ``layers``, ``base`` and ``positions``. A ``*`` stands for any number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Stack:
    """A list of layers with the same structure.

    * ``layers``: the list itself.
    * ``attention``: the module that transformers hands to the attention function.
    * ``projection``, ``feedforward``: the linear map of each role. ``feedforward`` may have several variants; the first
      whose modules all exist is used.
    * ``position``: how positions are encoded: rope, learned, bias or none.
    * ``positions``: the rotary modules or position tables that encode them.
    * ``causal``: whether attention is causal in modules without an ``is_causal`` attribute.
    * ``name``, ``base``: encoder or decoder, and the module whose forward receives ``past_key_values``.
    * ``heads``: the configuration key of the number of heads.
    * ``cross_attention``, ``cross``: the attention to an encoder and its maps, in layers that have it.
    * ``closed``: why the attention function and the cache of these layers cannot be replaced; empty if they can.
    """

    layers: str
    attention: str
    projection: Mapping[str, str]
    feedforward: tuple[Mapping[str, str], ...]
    position: str
    causal: bool = False
    name: str = ""
    base: str = ""
    heads: str = "num_attention_heads"
    cross_attention: str = ""
    cross: Mapping[str, str] = field(default_factory=dict)
    closed: str = ""
    positions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Where the slots of a family are.

    * ``tables``: possible paths of the token table; the first that exists is used. Modules that share it are found
      by tied weights.
    * ``stacks``: the lists of layers; those that a model lacks (an encoder alone) are skipped.
    * ``untouched``: modules that stay unchanged: the path (or its beginning) and the reason.
    * ``longest``: the configuration key of the greatest number of positions, empty if there is no limit. ``reserved``
      of these are never used (RoBERTa counts from its padding id).
    """

    tables: tuple[str, ...]
    stacks: tuple[Stack, ...]
    untouched: Mapping[str, str] = field(default_factory=dict)
    longest: str = "max_position_embeddings"
    reserved: int = 0


POSITIONS = "learned position table: small, and read once per token"
TOKEN_TYPES = "token-type table: only a few rows"
POOLER = "pooler: outside the five slots"
BIAS = "relative position bias: part of the attention scores"

BERT_STACK = Stack(
    layers="encoder.layer",
    attention="attention.self",
    projection={
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
    },
    feedforward=({"up": "intermediate.dense", "down": "output.dense"},),
    position="learned",
    positions=("embeddings.position_embeddings",),
    cross_attention="crossattention.self",
    cross={
        "cross_q": "crossattention.self.query",
        "cross_k": "crossattention.self.key",
        "cross_v": "crossattention.self.value",
        "cross_o": "crossattention.output.dense",
    },
)
BERT = Family(
    tables=("embeddings.word_embeddings",),
    stacks=(BERT_STACK,),
    untouched={
        "embeddings.position_embeddings": POSITIONS,
        "embeddings.token_type_embeddings": TOKEN_TYPES,
        "pooler": POOLER,
    },
)
ROBERTA = replace(BERT, reserved=2)
DISTILBERT = Family(
    tables=("embeddings.word_embeddings",),
    stacks=(
        Stack(
            layers="transformer.layer",
            attention="attention",
            projection={
                "q": "attention.q_lin",
                "k": "attention.k_lin",
                "v": "attention.v_lin",
                "o": "attention.out_lin",
            },
            feedforward=({"up": "ffn.lin1", "down": "ffn.lin2"},),
            position="learned",
            positions=("embeddings.position_embeddings",),
        ),
    ),
    untouched={"embeddings.position_embeddings": POSITIONS},
)
GPT2 = Family(
    tables=("wte",),
    stacks=(
        Stack(
            layers="h",
            attention="attn",
            projection={"qkv": "attn.c_attn", "o": "attn.c_proj"},
            feedforward=({"up": "mlp.c_fc", "down": "mlp.c_proj"},),
            position="learned",
            positions=("wpe",),
            causal=True,
        ),
    ),
    untouched={
        "wpe": POSITIONS,
        "h.*.crossattention": "cross-attention with keys and values in one map: stays unchanged",
    },
)
GPT_NEOX = Family(
    tables=("embed_in",),
    stacks=(
        Stack(
            layers="layers",
            attention="attention",
            projection={"qkv": "attention.query_key_value", "o": "attention.dense"},
            feedforward=({"up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"},),
            position="rope",
            positions=("rotary_emb",),
            causal=True,
        ),
    ),
)
LLAMA = Family(
    tables=("embed_tokens",),
    stacks=(
        Stack(
            layers="layers",
            attention="self_attn",
            projection={
                "q": "self_attn.q_proj",
                "k": "self_attn.k_proj",
                "v": "self_attn.v_proj",
                "o": "self_attn.o_proj",
            },
            feedforward=({"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},),
            position="rope",
            positions=("rotary_emb",),
            causal=True,
        ),
    ),
)
BART_ENCODER = Stack(
    name="encoder",
    base="encoder",
    layers="encoder.layers",
    attention="self_attn",
    projection={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
    },
    feedforward=({"up": "fc1", "down": "fc2"},),
    position="learned",
    positions=("encoder.embed_positions",),
    heads="encoder_attention_heads",
)
BART = Family(
    tables=("shared", "decoder.embed_tokens"),
    stacks=(
        BART_ENCODER,
        replace(
            BART_ENCODER,
            name="decoder",
            base="decoder",
            layers="decoder.layers",
            positions=("decoder.embed_positions",),
            causal=True,
            heads="decoder_attention_heads",
            cross_attention="encoder_attn",
            cross={
                "cross_q": "encoder_attn.q_proj",
                "cross_k": "encoder_attn.k_proj",
                "cross_v": "encoder_attn.v_proj",
                "cross_o": "encoder_attn.out_proj",
            },
        ),
    ),
    untouched={"encoder.embed_positions": POSITIONS, "decoder.embed_positions": POSITIONS},
)
T5_ENCODER = Stack(
    name="encoder",
    base="encoder",
    layers="encoder.block",
    attention="layer.0.SelfAttention",
    projection={role: f"layer.0.SelfAttention.{role}" for role in ("q", "k", "v", "o")},
    feedforward=(
        {"up": "layer.1.DenseReluDense.wi", "down": "layer.1.DenseReluDense.wo"},
        {
            "gate": "layer.1.DenseReluDense.wi_0",
            "up": "layer.1.DenseReluDense.wi_1",
            "down": "layer.1.DenseReluDense.wo",
        },
    ),
    position="bias",
)
T5 = Family(
    tables=("shared",),
    stacks=(
        T5_ENCODER,
        replace(
            T5_ENCODER,
            name="decoder",
            base="decoder",
            layers="decoder.block",
            causal=True,
            cross_attention="layer.1.EncDecAttention",
            cross={f"cross_{role}": f"layer.1.EncDecAttention.{role}" for role in ("q", "k", "v", "o")},
            feedforward=(
                {"up": "layer.2.DenseReluDense.wi", "down": "layer.2.DenseReluDense.wo"},
                {
                    "gate": "layer.2.DenseReluDense.wi_0",
                    "up": "layer.2.DenseReluDense.wi_1",
                    "down": "layer.2.DenseReluDense.wo",
                },
            ),
        ),
    ),
    untouched={
        "encoder.block.*.layer.0.SelfAttention.relative_attention_bias": BIAS,
        "decoder.block.*.layer.0.SelfAttention.relative_attention_bias": BIAS,
    },
    longest="",
)

FAMILIES: Mapping[str, Family] = {
    "bart": BART,
    "bert": BERT,
    "camembert": ROBERTA,
    "distilbert": DISTILBERT,
    "gemma": LLAMA,
    "gemma2": LLAMA,
    "gemma3_text": LLAMA,
    "gpt2": GPT2,
    "gpt_neox": GPT_NEOX,
    "llama": LLAMA,
    "mbart": BART,
    "mistral": LLAMA,
    "mt5": T5,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "roberta": ROBERTA,
    "t5": T5,
    "umt5": T5,
    "xlm-roberta": ROBERTA,
}
