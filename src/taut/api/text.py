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
    """Read a text once and keep the decoder's cache, for all texts that begin with it.

    Call the model's ``generate`` with ``prefix.before(ids)`` and ``past_key_values=prefix.cache()``.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A decoder: folder, Hub id, scratch spec, or a model in memory.
    text : str or Tensor
        The text, or its ids (T,).
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a model in memory; default: the one in the folder.
    out : str or Path, optional
        File to write the prefix to.
    device : str
        Where to run, such as ``cuda``. Not for a model in memory.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own. Not for a model in memory.

    Returns
    -------
    Prefix
        ``ids`` (T,) and the cache after them.

    Raises
    ------
    TautError
        For wrong input, and for a model that has no cache.

    Examples
    --------
    >>> import torch
    >>> model = taut.load("llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2")
    >>> taut.prefix(model, torch.tensor([5, 6, 7])).entries
    3
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
    """Continue a prompt with a decoder, and measure the speed and the size of the cache.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A decoder: folder, Hub id, scratch spec, or a model in memory.
    prompt : str
        The text to continue.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a model in memory; default: the one in the folder.
    prefix : str, Path or Prefix, optional
        What comes before the prompt: a file, or what ``taut.prefix`` returned.
    tokens : int
        Most new tokens.
    temperature : float
        0 takes the most likely token at each step.
    seed : int
        Seed of the samples at higher temperatures.
    device : str
        Where to run, such as ``cuda``. Not for a model in memory.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own. Not for a model in memory.
    on_text : callable
        Called with each piece of text as soon as it is finished.

    Returns
    -------
    Generated
        ``text``, its ``ids`` (N,), seconds and bytes of the cache.

    Raises
    ------
    TautError
        For wrong input, and without a tokenizer.

    Examples
    --------
    >>> model = taut.load("llama:hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2")
    >>> result = taut.generate(model, "Once", tokenizer=taut.vectors("minilm").tokenizer, tokens=4)
    >>> len(result.ids)
    4
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
