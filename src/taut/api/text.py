"""Text from decoders, and prefixes that many texts share."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taut.api.sources import read_dtype
from taut.core.errors import TautError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from taut.generation.generate import Generated
    from taut.generation.prefix import Prefix


def prefix(
    model: "str | Path | PreTrainedModel",
    text: "str | torch.Tensor",
    *,
    tokenizer: Any = None,
    out: str | Path | None = None,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
) -> "Prefix":
    """What a decoder keeps of ``text``, to be shared by everything that begins with it: ``prefix.cache()`` goes to
    ``generate`` as ``past_key_values``, with ``prefix.before(ids)``. With ``out`` also written to a file.

    ``text`` may be (T,) ids. Raises TautError for wrong input.
    """
    from taut.generation.prefix import read

    opened, known = _opened(model, tokenizer, device, dtype)
    found = read(opened, text, known)
    if out is not None:
        found.save(out)
    return found


def generate(
    model: "str | Path | PreTrainedModel",
    prompt: str,
    *,
    tokenizer: Any = None,
    prefix: "str | Path | Prefix | None" = None,
    tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
    dtype: "str | torch.dtype | None" = None,
    tell: Callable[[str], None] = lambda piece: None,
) -> "Generated":
    """A continuation of ``prompt``, after a ``prefix`` where there is one (a file, or what ``taut.prefix`` gave), with
    its speed and the size of its cache. ``tell`` hears pieces as they come. Raises TautError for wrong input."""
    from taut.generation.generate import generate as run
    from taut.generation.prefix import Prefix

    opened, known = _opened(model, tokenizer, device, dtype)
    if known is None:
        raise TautError("generate: no tokenizer beside the model: give tokenizer=")
    earlier = Prefix.load(prefix, opened) if isinstance(prefix, str | Path) else prefix
    options = {"tokens": tokens, "temperature": temperature, "seed": seed, "tell": tell}
    return run(opened, known, prompt, prefix=earlier, **options)


def _opened(model: Any, tokenizer: Any, device: str, dtype: Any) -> tuple[Any, Any]:
    """The model, and its tokenizer or None."""
    from taut.surgery.loading import open_model, open_tokenizer, resolve

    if not isinstance(model, str | Path):
        return model, tokenizer
    source = resolve(model)
    return open_model(source, read_dtype(dtype), device), tokenizer or open_tokenizer(source)
