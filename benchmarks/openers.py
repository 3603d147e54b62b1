"""Opening a model folder with the tools that people use, none of which knows taut. Imports nothing of taut itself, so
that a process can run it with taut imported and another without. Shared, no claim of its own.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

SENTENCES = [
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her dog.",
    "Tom and his mom went to the store to buy a big red ball, some bread and a small toy car for his sister.",
]
NEW_TOKENS = 48

Opener = Callable[[Path, PreTrainedModel | None], Any]
"""Opens a folder, or takes a model instead, and returns what comes out on SENTENCES."""


@torch.no_grad()
def auto_model(folder: Path, model: PreTrainedModel | None) -> list[Tensor]:
    """Last hidden states (1, T, D) of each sentence; without the head if there is one."""
    model = AutoModel.from_pretrained(folder).eval() if model is None else model.base_model
    return [model(**arguments).last_hidden_state for arguments in _tokens(folder)]


@torch.no_grad()
def auto_model_for_causal_lm(folder: Path, model: PreTrainedModel | None) -> list[Tensor]:
    """Logits (1, T, V) of each sentence; then greedy decoding from its beginning: ids, and the logits of each step."""
    model = model or AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for arguments in _tokens(folder):
        start = {name: tensor[:, :12] for name, tensor in arguments.items()}
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        story = model.generate(**start, max_new_tokens=NEW_TOKENS, **options)
        found += [model(**arguments).logits, story.sequences, torch.stack(story.logits)]
    return found


def feature_extraction(folder: Path, model: PreTrainedModel | None) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return pipeline("feature-extraction", model=model or str(folder), tokenizer=tokenizer, device="cpu")(SENTENCES)


def text_generation(folder: Path, model: PreTrainedModel | None) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    generate = pipeline("text-generation", model=model or str(folder), tokenizer=tokenizer, device="cpu")
    return generate(SENTENCES, max_new_tokens=NEW_TOKENS, do_sample=False)


def sentence_transformers(folder: Path, model: PreTrainedModel | None) -> Tensor:
    """Unit vectors (B, D), through the folder's own module and pooling settings."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(folder), device="cpu")
    if model is not None:
        encoder[0].model = model
    return encoder.encode(SENTENCES, convert_to_tensor=True)


ENCODER: dict[str, Opener] = {
    "AutoModel": auto_model,
    "pipeline": feature_extraction,
    "sentence-transformers": sentence_transformers,
}
DECODER: dict[str, Opener] = {
    "AutoModel": auto_model,
    "AutoModelForCausalLM": auto_model_for_causal_lm,
    "pipeline": text_generation,
}


def answers(folder: Path, model: PreTrainedModel | None = None) -> dict[str, str]:
    """A digest of the bits of what each tool gives for a folder, or for ``model``; the error where one raises."""
    config = json.loads((folder / "config.json").read_text())
    openers = DECODER if config["architectures"][0].endswith("ForCausalLM") else ENCODER
    found = {}
    for name, opener in openers.items():
        try:
            found[name] = digest(opener(folder, model))
        except Exception as error:
            # Whatever a tool raises is what this wants to know.
            found[name] = f"{type(error).__name__}: {error}"
    return found


def digest(value: Any) -> str:
    """Equal for equal bits: dtype, shape and bytes of tensors, the shortest exact decimals of numbers."""
    if isinstance(value, Tensor):
        value = f"{value.dtype} {tuple(value.shape)} {_sha(value.contiguous().view(torch.uint8).numpy().tobytes())}"
    elif isinstance(value, list):
        value = [digest(item) if isinstance(item, Tensor) else item for item in value]
    return f"sha256 {_sha(json.dumps(value).encode())}"


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _tokens(folder: Path) -> list[dict[str, Tensor]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    names = ("input_ids", "attention_mask")
    encoded = [tokenizer(sentence, return_tensors="pt") for sentence in SENTENCES]
    return [{name: arguments[name] for name in names} for arguments in encoded]


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    print("ANSWERS " + json.dumps({folder: answers(Path(folder)) for folder in sys.argv[1:]}))
