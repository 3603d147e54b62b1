"""Turns texts into unit vectors, with the pooling that the model was trained with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from taut import data
from taut.core.errors import TautError, nearest
from taut.core.progress import Progress
from taut.core.table import clip
from taut.evaluation._encode import POOLINGS, encode
from taut.evaluation.task import reads_text
from taut.retrieval.index import Index, chosen_codes, prefix
from taut.surgery.loading import open_model, open_tokenizer, resolve
from taut.surgery.modes import evaluating

LENGTH = 256
"""Tokens kept of a text if the model's folder does not give a number."""


@dataclass(frozen=True)
class Encoder:
    """A model that reads text, its tokenizer, and how to pool its states to one vector of width D.

    ``open_encoder`` makes one.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: str = "mean"
    max_length: int = LENGTH
    lower: bool = False
    name: str = ""

    def __repr__(self) -> str:
        name = self.name or type(self.model).__name__
        return clip(f"Encoder({name}, {self.pooling} of at most {self.max_length} tokens, width {self.width})")

    @property
    def width(self) -> int:
        """D, the width of the vectors before any prefix is taken."""
        return self.model.config.get_text_config().hidden_size

    def encode(
        self,
        sentences: Sequence[str],
        width: int | None = None,
        *,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> Tensor:
        """Encode N texts as unit vectors (N, D), float32 on the CPU.

        With ``width``, keeps only the first ``width`` numbers of each vector and rescales them to unit length. Runs
        batches of similar length and calls ``progress(done, N)`` after each. Raises TautError for a single string and
        for a width that is out of range.
        """
        if isinstance(sentences, str):
            raise TautError("encode: expected a list of texts, not one string; put it in a list")
        if not len(sentences):
            return prefix(torch.zeros(0, self.width), width)
        texts = [text.lower() for text in sentences] if self.lower else sentences
        with evaluating(self.model):
            vectors = encode(
                self.model,
                self.tokenizer,
                texts,
                max_length=self.max_length,
                batch_size=batch_size,
                progress=progress or (lambda done, total: None),
                pooling=self.pooling,
            )
        return prefix(vectors, width)

    def index(
        self,
        documents: Sequence[str],
        code: str = "int8",
        *,
        calibration: Sequence[str] | None = None,
        keep_texts: bool = False,
        batch_size: int = 32,
        progress: Progress | None = None,
        **options: Any,
    ) -> Index:
        """Encode documents and build an index of them; ``options`` as in ``Index.build``.

        The code is fitted on the documents, or on the texts ``calibration``. ``keep_texts`` stores the documents in the
        index. Raises TautError for wrong input.
        """
        # Encoding takes minutes, so check the options first.
        chosen_codes(self.width, code, **{key: options[key] for key in ("width", "bytes", "finer") if key in options})
        vectors = self.encode(documents, batch_size=batch_size, progress=progress)
        calibration_vectors = None if calibration is None else self.encode(calibration, batch_size=batch_size)
        built = Index.build(vectors, code, calibration=calibration_vectors, **options)
        return replace(built, texts=tuple(documents) if keep_texts else (), model=self.name)


def open_encoder(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Encoder:
    """Open an encoder from a folder, Hub id or ``minilm``, or from a model in memory and its tokenizer.

    The model may be compressed or not.
    If a folder has the files of sentence-transformers, they decide pooling, length and lower case. For any other model,
    decoders included, the vector is the mean of the last states over the real tokens, and texts are cut after 256
    tokens. ``pooling`` (mean, cls, lasttoken, max) and ``max_length`` override both. Raises TautError for wrong input,
    and for a folder whose sentence-transformers modules do more than pool and normalise.
    """
    settings: dict[str, Any] = {}
    name = ""
    if isinstance(model, str | Path):
        source = resolve(model)
        name = source.name
        settings = trained_with(source.folder) if source.folder else {}
        tokenizer = tokenizer or open_tokenizer(source)
        if tokenizer is None:
            raise TautError(f"{name}: no tokenizer found; encoding texts needs one")
        model = open_model(source, dtype, device, seed)
    if tokenizer is None:
        raise TautError("vectors: a model in memory needs its tokenizer=")
    reason = reads_text(model)
    if reason:
        raise TautError(f"vectors: {reason}")
    settings |= {key: value for key, value in (("pooling", pooling), ("max_length", max_length)) if value is not None}
    if settings.get("pooling", "mean") not in POOLINGS:
        raise TautError(f"pooling {settings['pooling']!r}: {nearest(settings['pooling'], POOLINGS)}")
    if settings.get("max_length", LENGTH) < 2:
        raise TautError(f"max_length = {settings['max_length']}: expected at least 2, special tokens included")
    return Encoder(model, tokenizer, name=name, **settings)


def trained_with(folder: Path) -> dict[str, Any]:
    """Read ``pooling``, ``max_length`` and ``lower`` from the files of sentence-transformers in ``folder``.

    A setting that the files do not give is left out. Raises TautError for modules that taut does not run.
    """
    trained: dict[str, Any] = {}
    modules = _read(folder / "modules.json") or []
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            trained["pooling"] = _pooling(folder / module["path"] / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise TautError(f"{folder}: its sentence vectors pass through {kind}, which taut does not run")
    if modules:
        settings = _read(folder / "sentence_bert_config.json") or {}
        if settings.get("max_seq_length"):
            trained["max_length"] = settings["max_seq_length"]
        trained["lower"] = bool(settings.get("do_lower_case"))
    return trained


def documents_of(path: str | Path) -> list[str]:
    """The documents in a text file or named text: its paragraphs, or its lines if it has only one paragraph."""
    paragraphs = data.paragraphs(str(path)).column(0)
    if len(paragraphs) > 1:
        return paragraphs
    lines = data.text(str(path)).column(0)[0].splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def _pooling(path: Path) -> str:
    """The pooling that a config names, in the new form or the old one (one switch per pooling).

    Raises TautError for several poolings or an unknown one.
    """
    config = _read(path) or {}
    named = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value
    ]
    ways = [named] if isinstance(named, str) else list(named) or ["mean"]
    if len(ways) > 1 or ways[0] not in POOLINGS:
        raise TautError(f"{path}: pooling {' + '.join(ways)}: expected exactly one of {', '.join(POOLINGS)}")
    return ways[0]


def _read(path: Path) -> Any:
    """The content of a JSON file, or None if the file does not exist."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TautError(f"{path}: not readable as JSON: {error}") from None
