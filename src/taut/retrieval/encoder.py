"""From texts to unit vectors, with the pooling that the model was trained with."""

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
from taut.evaluation._encode import POOLINGS, encode
from taut.evaluation.task import Progress, reads_text
from taut.retrieval.index import Index, chosen_codes, prefix
from taut.surgery.loading import open_model, open_tokenizer, resolve
from taut.surgery.modes import evaluating

LENGTH = 256
"""Tokens kept of a text where the model's folder names no number."""


@dataclass(frozen=True)
class Encoder:
    """A model that reads text, its tokenizer, and how its states become one vector of width D; ``open_encoder``."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: str = "mean"
    max_length: int = LENGTH
    lower: bool = False
    name: str = ""

    @property
    def width(self) -> int:
        """D, of the vectors before any prefix is taken."""
        return self.model.config.get_text_config().hidden_size

    def encode(
        self,
        sentences: Sequence[str],
        width: int | None = None,
        *,
        batch_size: int = 32,
        progress: Progress | None = None,
    ) -> Tensor:
        """N texts -> (N, D) float32 unit vectors on the CPU; of ``width`` numbers, the first so many made unit again.

        In batches of similar length; ``progress(done, N)`` after each. Raises TautError for a single string and for a
        width that the vectors do not have.
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
        """The documents, encoded and coded; ``options`` as in ``Index.build``.

        What a code fits is fitted on the documents, or on the texts ``calibration``. ``keep_texts`` keeps the documents
        beside their vectors. Raises TautError for wrong input.
        """
        # Encoding takes minutes; a wrong word is said before.
        chosen_codes(self.width, code, **{key: options[key] for key in ("width", "bytes", "finer") if key in options})
        vectors = self.encode(documents, batch_size=batch_size, progress=progress)
        known = None if calibration is None else self.encode(calibration, batch_size=batch_size)
        built = Index.build(vectors, code, calibration=known, **options)
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
    """An encoder from a folder, Hub id or ``minilm``, compressed or not, or from a model in memory and its tokenizer.

    A folder with the files of sentence-transformers decides pooling, length and lower case; anything else is pooled by
    the mean of its last states over the real tokens and cut after 256 tokens, decoders too. ``pooling`` (mean, cls,
    lasttoken, max) and ``max_length`` overrule. Raises TautError for wrong input, and for a folder whose
    sentence-transformers modules do more than pool and normalise.
    """
    settings: dict[str, Any] = {}
    name = ""
    if isinstance(model, str | Path):
        source = resolve(model)
        name = source.name
        settings = trained_with(source.folder) if source.folder else {}
        tokenizer = tokenizer or open_tokenizer(source)
        if tokenizer is None:
            raise TautError(f"{name}: no tokenizer there, and texts need one")
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
    """``pooling``, ``max_length`` and ``lower`` as far as the files of sentence-transformers in ``folder`` say them.

    Raises TautError for modules that taut does not run.
    """
    found: dict[str, Any] = {}
    modules = _read(folder / "modules.json") or []
    for module in modules:
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            found["pooling"] = _pooling(folder / module["path"] / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise TautError(f"{folder}: its sentence vectors pass through {kind}, which taut does not run")
    if modules:
        settings = _read(folder / "sentence_bert_config.json") or {}
        if settings.get("max_seq_length"):
            found["max_length"] = settings["max_seq_length"]
        found["lower"] = bool(settings.get("do_lower_case"))
    return found


def documents_of(path: str | Path) -> list[str]:
    """The documents in a text file or named text: its paragraphs, or its lines where no line is blank."""
    paragraphs = data.paragraphs(str(path)).column(0)
    if len(paragraphs) > 1:
        return paragraphs
    lines = data.text(str(path)).column(0)[0].splitlines()
    return [" ".join(line.split()) for line in lines if line.strip()]


def _pooling(path: Path) -> str:
    """The one way of pooling that a config names, in the new form or the old one (a switch for each way)."""
    config = _read(path) or {}
    named = config.get("pooling_mode") or [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value
    ]
    ways = [named] if isinstance(named, str) else list(named) or ["mean"]
    if len(ways) > 1 or ways[0] not in POOLINGS:
        raise TautError(f"{path}: pooling {' + '.join(ways)}: taut has one of {', '.join(POOLINGS)}")
    return ways[0]


def _read(path: Path) -> Any:
    """The content of a JSON file, None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TautError(f"{path}: not readable as JSON: {error}") from None
