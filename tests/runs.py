"""Small training runs, for the tests of training."""

import json
import sys
from pathlib import Path
from typing import Any

from taut.training.run import train

LLAMA = (
    "llama:hidden_size=32,intermediate_size=64,num_hidden_layers=2,num_attention_heads=4,max_position_embeddings=64,"
    "tie_word_embeddings=true"
)
LOW_RANK = {"feedforward": {"method": "low_rank", "keep": 0.5, "layers": "1:"}}
SMALL: dict[str, Any] = {
    "model": LLAMA,
    "text": "tiny.txt",
    "tokenizer": "bytes",
    "length": 16,
    "batch": 4,
    "budget": {"steps": 8},
    "evaluate": {"every": 0.5, "tokens": 200},
}
TEXT = "\n\n".join(f"Number {n} of {n * n} lines says {'ab' * (n % 7)} and then {n + 3} more." for n in range(200))


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    """A spec whose text lies in ``folder``."""
    text = folder / "tiny.txt"
    if not text.is_file():
        text.write_text(TEXT)
    return SMALL | {"text": str(text)} | changes


if __name__ == "__main__":
    # A run in a process of its own: the spec as JSON, and the folder.
    train(json.loads(sys.argv[1]), sys.argv[2], progress=lambda moment: print(moment.step, flush=True))
