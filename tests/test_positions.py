"""How long a text a model can read: numbers by hand, and what refuses a longer one."""

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, RobertaConfig, T5Config

import taut
from taut.architectures.positions import position_limit
from taut.contract.tiny import tiny


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (LlamaConfig(max_position_embeddings=96), 96),
        # GPT-2 calls it n_positions.
        (GPT2Config(n_positions=40), 40),
        # 514 rows of RoBERTa's table: the padding id 1 and what lies before it are no positions.
        (RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        # Relative positions have no end.
        (T5Config(), None),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_limits_by_hand(config: object, limit: int | None) -> None:
    assert position_limit(config) == limit


def test_a_prefix_longer_than_the_positions_is_refused() -> None:
    model = tiny("gpt2", n_positions=16)
    assert len(taut.prefix(model, torch.arange(5, 21)).ids) == 16
    with pytest.raises(taut.TautError, match="17 tokens, but GPT2LMHeadModel has 16 positions"):
        taut.prefix(model, torch.arange(5, 22))
