"""Generate text with decoders, and prepare prefixes that many texts share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.api.sources import check_models, read_dtype
from taut.core.errors import TautError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from taut.generation.generate import Generated
    from taut.generation.prefix import Prefix


def prefix(
    model: "str | Path | PreTrainedModel",
    text: "str | torch.Tensor",
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    out: str | Path | None = None,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
) -> "Prefix":
    """Read ``text`` once and keep the decoder's key/value cache, for all texts that begin with it.

    Call the model's ``generate`` with ``prefix.before(ids)`` and ``past_key_values=prefix.cache()``. With ``out``, also
    write the prefix to that file. ``text`` may be ids (T,). Raises TautError for wrong input.
    """
    check_models(model)
    dtype = read_dtype(dtype)
    from taut.generation.prefix import read

    opened, tokenizer = _opened(model, tokenizer, device, dtype)
    result: Prefix = read(opened, text, tokenizer)
    if out is not None:
        result.save(out)
    return result


def generate(
    model: "str | Path | PreTrainedModel",
    prompt: str,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    prefix: "str | Path | Prefix | None" = None,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
    on_text: Callable[[str], None] = lambda piece: None,
) -> "Generated":
    """Continue ``prompt`` with at most ``tokens`` new tokens; also returns the speed and the size of the cache.

    ``prefix`` comes before the prompt: a file, or what ``taut.prefix`` returned. At ``temperature`` 0 each step takes
    the most likely token. ``on_text`` is called with each piece of text as soon as it is finished. Raises TautError for
    wrong input.
    """
    check_models(model)
    dtype = read_dtype(dtype)
    from taut.generation.generate import generate as run
    from taut.generation.prefix import Prefix

    opened, tokenizer = _opened(model, tokenizer, device, dtype)
    if tokenizer is None:
        raise TautError("generate: no tokenizer beside the model; give tokenizer=")
    earlier = Prefix.load(prefix, opened) if isinstance(prefix, str | Path) else prefix
    result: Generated = run(
        opened, tokenizer, prompt, prefix=earlier, tokens=tokens, temperature=temperature, seed=seed, on_text=on_text
    )
    return result


def _opened(model: Any, tokenizer: Any, device: str, dtype: Any) -> tuple[Any, Any]:
    """The model, and its tokenizer or None."""
    from taut.surgery.loading import open_model, open_tokenizer, resolve

    if not isinstance(model, str | Path):
        return model, tokenizer
    source = resolve(model)
    return open_model(source, dtype, device), tokenizer or open_tokenizer(source)
