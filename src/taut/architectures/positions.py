"""How long a text a model can read."""

from transformers import PretrainedConfig


def position_limit(config: PretrainedConfig) -> int | None:
    """The most tokens that the model's positions allow, or None where the configuration names no limit."""
    config = config.get_text_config()
    # T5 has no such number. GPT-2 has it under another name, which only attribute access knows.
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return None
    # RoBERTa's positions start after the padding id, so its table is longer than its sequences.
    return positions - (config.pad_token_id or 0) - 1 if "roberta" in config.model_type else positions
