"""Make sentence vectors, and search in them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from taut.api.sources import check_models, check_out, read_dtype
from taut.core.progress import Progress

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from taut.retrieval.encoder import Encoder
    from taut.retrieval.index import Index

Code = Literal["float", "int8", "binary", "pq"]


def vectors(
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    seed: int = 0,
) -> "Encoder":
    """Make an encoder that turns sentences into vectors.

    Its ``encode(sentences, width)`` returns unit vectors, one a row. Its ``index(documents, code)`` returns an index to
    search in. The default ``pooling`` is what the model's folder says, else the mean. Raises TautError for wrong input.
    """
    check_models(model)
    dtype = read_dtype(dtype)
    from taut.retrieval.encoder import open_encoder

    return open_encoder(model, tokenizer, pooling=pooling, max_length=max_length, dtype=dtype, device=device, seed=seed)


def index(
    model: "str | Path | PreTrainedModel",
    documents: str | Path | Sequence[str],
    out: str | Path | None = None,
    *,
    code: Code = "int8",
    width: int | None = None,
    rotate: bool = False,
    bytes: int | None = None,
    finer: Code | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> "Index":
    """Index documents by their sentence vectors; with ``out``, also write the index to that folder.

    ``documents`` is a list of texts, or the name of one text. That text is split into paragraphs, or into lines if it
    has only one paragraph. ``options``: code (float, int8, binary, pq), width, rotate, bytes, finer. Raises TautError
    for wrong input.
    """
    check_models(model)
    check_out(out)
    dtype = read_dtype(dtype)
    from taut.retrieval.encoder import documents_of

    texts = documents_of(documents) if isinstance(documents, str | Path) else documents
    encoder = vectors(model, tokenizer, dtype=dtype, device=device, seed=seed)
    built = encoder.index(
        texts,
        code,
        width=width,
        rotate=rotate,
        bytes=bytes,
        finer=finer,
        keep_texts=True,
        seed=seed,
        progress=progress,
    )
    if out is not None:
        built.save(out)
    return built


def search(
    index: "str | Path | Index",
    queries: Sequence[str],
    k: int = 10,
    *,
    model: "str | Path | PreTrainedModel | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    dtype: "str | torch.dtype | None" = None,
    device: str = "cpu",
    candidates: int | None = None,
) -> list[list[dict[str, Any]]]:
    """Find the k nearest documents of each query, each as ``score``, ``id`` and ``text``.

    The default ``model`` is the one that the index was made with. ``candidates`` is how many documents to score a
    second time, more exactly. Raises TautError for wrong input.
    """
    from taut.retrieval.facts import read_facts

    check_models(model)
    if isinstance(index, str | Path):
        read_facts(Path(index))
    dtype = read_dtype(dtype)
    from taut.retrieval.index import Index

    opened = index if isinstance(index, Index) else Index.load(index)
    encoder = vectors(model or opened.model, tokenizer, dtype=dtype, device=device)
    return opened.describe(opened.search(encoder.encode(queries), k, candidates=candidates))
