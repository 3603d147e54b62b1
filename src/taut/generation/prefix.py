"""The key/value cache of a prefix that many texts share: computed once, reused often, saved in a file."""

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from taut.architectures.positions import position_limit
from taut.core.errors import TautError
from taut.core.numbers import scaled
from taut.core.site import MemorySite
from taut.ops.caches.base import PositionedCache
from taut.surgery.apply import is_compressed, steps_of

SAMPLES = 64
"""Numbers of every tensor that enter a model's fingerprint."""
CHUNK = 1024
"""Tokens read at once, so that a long text needs no mask over all pairs of its tokens."""


@dataclass(frozen=True)
class Prefix:
    """A text that a model has read.

    ``ids`` (T,) int64 are its tokens, ``memory`` is the cache after reading them. ``fingerprint`` identifies the model:
    its configuration with positions and recipe, and a sample of its weights.
    """

    ids: Tensor
    memory: Cache
    fingerprint: str

    def __repr__(self) -> str:
        return f"Prefix({len(self.ids):,} tokens, {self.entries:,} entries in a layer, {scaled(self.bytes, 'B')})"

    def cache(self, rows: int = 1) -> Cache:
        """A new copy of the cache for ``rows`` continuations; ``memory`` itself never changes."""
        cache = copy.deepcopy(self.memory)
        if rows > 1:
            cache.batch_repeat_interleave(rows)
        return cache

    def before(self, ids: Tensor) -> Tensor:
        """(B, T') ids that follow the prefix -> (B, T + T') ids of the whole texts, as ``generate`` expects them."""
        return torch.cat([self.ids.to(ids.device).expand(len(ids), -1), ids], 1)

    @property
    def entries(self) -> int:
        """The number of cache entries in a layer; the maximum over all layers."""
        return max((layer.keys.shape[2] for layer in self.memory.layers if layer.is_initialized), default=0)

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values."""
        layers = [layer for layer in self.memory.layers if layer.is_initialized]
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, complete or not at all. Raises TautError if it cannot be written."""
        tensors = {"ids": self.ids}
        for index, layer in enumerate(self.memory.layers):
            tensors |= {f"keys.{index}": layer.keys, f"values.{index}": layer.values}
        if isinstance(self.memory, PositionedCache):
            tensors |= {f"state.{name}": tensor for name, tensor in self.memory.state().items()}
        target = Path(path)
        temporary = target.with_name(f".{target.name}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
            save_file(whole, temporary, metadata={"taut_prefix": self.fingerprint})
            temporary.replace(target)
        except OSError as error:
            raise TautError(f"{target}: cannot write there: {error.strerror or error}") from None
        finally:
            temporary.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> "Prefix":
        """Load a file that was written with this very model.

        Raises TautError for another model, recipe or position scheme, and for a file that is not a prefix.
        """
        try:
            with safe_open(path, framework="pt", device=str(model.device)) as file:
                written = (file.metadata() or {}).get("taut_prefix")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
        except (OSError, SafetensorError) as error:
            raise TautError(f"{path}: not readable as a prefix: {' '.join(str(error).split())}") from None
        if written is None or "ids" not in tensors:
            raise TautError(f"{path}: not a prefix: write one with taut prefix MODEL --text-file FILE --out {path}")
        expected = fingerprint(model)
        if written != expected:
            raise TautError(
                f"{path}: made with another model, recipe or position scheme (fingerprint {written[:12]}, this one is "
                f"{expected[:12]}): write it again with taut prefix"
            )
        memory = empty_cache(model)
        for index, layer in enumerate(_layers(memory, tensors)):
            keys, values = tensors[f"keys.{index}"], tensors[f"values.{index}"]
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        if isinstance(memory, PositionedCache):
            state = {
                name.removeprefix("state."): tensor for name, tensor in tensors.items() if name.startswith("state.")
            }
            memory.restore(state)
        return cls(tensors["ids"], memory, expected)


@torch.no_grad()
def read(model: PreTrainedModel, text: str | Tensor, tokenizer: PreTrainedTokenizerBase | None = None) -> Prefix:
    """Read a text, or (T,) ids, and return its prefix.

    Raises TautError for an empty text, a text that is too long for the model, a model that is no decoder, and a text
    without a tokenizer.
    """
    ids = _ids(text, tokenizer).to(model.device)
    check_length(model, len(ids))
    memory = empty_cache(model)
    for piece in ids.split(CHUNK):
        model(input_ids=piece[None], past_key_values=memory, use_cache=True)
    return Prefix(ids, memory, fingerprint(model))


def empty_cache(model: PreTrainedModel) -> Cache:
    """A new cache of the kind that the model's recipe sets. Raises TautError for a model that is no decoder."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise TautError(f"{type(model).__name__}: a prefix needs a decoder with a language-modelling head")
    for step in steps_of(model) if is_compressed(model) else ():
        if isinstance(step.site, MemorySite) and (cache := step.method.cache(step.site.layers)) is not None:
            return cache
    return DynamicCache(config=model.config)


def check_length(model: PreTrainedModel, tokens: int) -> None:
    """Raises TautError if the model has fewer positions than ``tokens``."""
    positions = position_limit(model.config)
    if positions is not None and tokens > positions:
        raise TautError(f"{tokens} tokens, but {type(model).__name__} has {positions} positions: shorten the text")


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the configuration, the recipe's plan and a sample of every tensor."""
    settings = model.config.to_dict()
    transient = ("_name_or_path", "transformers_version", "torch_dtype", "use_cache", "architectures")
    config = {key: value for key, value in settings.items() if key not in transient}
    config["quantization_config"] = _plan(settings.get("quantization_config"))
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        step = max(1, tensor.numel() // SAMPLES)
        sample = tensor.detach().reshape(-1)[::step][:SAMPLES].cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def _plan(config: Any) -> Any:
    """The part of a recipe's configuration that affects the output: its plan of steps."""
    return config.get("plan") if isinstance(config, dict) else vars(config).get("plan") if config is not None else None


def _ids(text: str | Tensor, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    if isinstance(text, Tensor):
        ids = text.reshape(-1)
    elif tokenizer is None:
        raise TautError("a text needs the model's tokenizer: give tokenizer=, or pass ids")
    else:
        ids = tokenizer(text, return_tensors="pt").input_ids[0] if text else torch.zeros(0, dtype=torch.long)
    if not len(ids):
        raise TautError("an empty text has no prefix: give at least one token")
    return ids


def _layers(memory: Cache, tensors: dict[str, Tensor]) -> list[Any]:
    """The layers of an empty cache. Transformers' own cache creates them on demand, so they are added here."""
    count = sum(name.startswith("keys.") for name in tensors)
    while len(memory.layers) < count:
        memory.layers.append(memory.layer_class_to_replicate())
    return memory.layers
