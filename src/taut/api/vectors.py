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

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, Hub id, ``minilm``, scratch spec, or a model in memory.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a model in memory; default: the one in the folder.
    pooling : str, optional
        How states become one vector; default: as the folder says, else ``mean``.
    max_length : int, optional
        Most tokens of a sentence; default: as the folder says.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own.
    device : str
        Where to run, such as ``cuda``.
    seed : int
        Seed of the random weights of a scratch spec.

    Returns
    -------
    Encoder
        ``encode(sentences, width)`` gives unit vectors (N, D); ``index(documents, code)`` gives an index to search in.

    Raises
    ------
    TautError
        For wrong input, and without a tokenizer.

    Examples
    --------
    >>> encoder = taut.vectors("minilm")
    >>> encoder.encode(["A cat.", "A boat."]).shape
    torch.Size([2, 384])
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
    """Index documents by their sentence vectors, and with ``out`` also write the index.

    Parameters
    ----------
    model : str, Path or PreTrainedModel
        A folder, Hub id, ``minilm``, scratch spec, or a model in memory.
    documents : str, Path or sequence of str
        Texts, or one file or named text, which is split into paragraphs, or into lines if it has only one.
    out : str or Path, optional
        Folder to write; it appears whole or not at all.
    code : {'float', 'int8', 'binary', 'pq'}
        How vectors are stored.
    width : int, optional
        Leading numbers of each vector to keep; default: all D.
    rotate : bool
        Rotate the principal directions to the front before the cut to ``width``.
    bytes : int, optional
        Bytes of each vector, for ``pq``.
    finer : {'float', 'int8', 'binary', 'pq'}, optional
        A second code, to score the best documents again.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a model in memory.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own.
    device : str
        Where to run, such as ``cuda``.
    seed : int
        Seed of codebooks.
    progress : callable, optional
        Called with (documents done, documents).

    Returns
    -------
    Index
        With its texts.

    Raises
    ------
    TautError
        For wrong input and for an option that does not fit the code.

    Examples
    --------
    >>> index = taut.index("minilm", ["A cat.", "A dog.", "A boat."], "pets", code="binary")
    >>> len(index), index.bytes_per_vector  # one bit for each of 384 numbers
    (3, 48)
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
    """Find the nearest documents of each query.

    Parameters
    ----------
    index : str, Path or Index
        The index, or its folder.
    queries : sequence of str
        Q texts.
    k : int
        Documents for each query.
    model : str, Path or PreTrainedModel, optional
        The encoder; default: the model that the index was made with.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a model in memory.
    dtype : str or torch.dtype, optional
        float32, bfloat16, float16 or float64; default: the folder's own.
    device : str
        Where to run, such as ``cuda``.
    candidates : int, optional
        Documents to score a second time, more exactly, if the index has a finer code.

    Returns
    -------
    list of list of dict
        For each query at most k documents, best first, each as ``score`` (cosine), ``id`` and ``text``.

    Raises
    ------
    TautError
        For wrong input.

    Examples
    --------
    >>> index = taut.index("minilm", ["A cat.", "A dog.", "A boat."])
    >>> taut.search(index, ["kitten"], k=1)[0][0]["text"]
    'A cat.'
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
