"""An index of coded vectors that can be searched, saved and loaded."""

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from taut.core.errors import TautError
from taut.core.table import clip
from taut.retrieval.codes import Code, code_named
from taut.retrieval.facts import FACTS, FORMAT, read_facts
from taut.surgery.folders import whole_folder

TENSORS, TEXTS = "index.safetensors", "documents.json"
ROWS_AT_ONCE = 1 << 14
QUERIES_AT_ONCE = 1 << 8
"""Together they bound the memory of a search beside the index: 16 MB of scores, and the work on one block of rows."""
CANDIDATES = 4
"""Candidates per requested hit, if an index has finer rows and the caller gives no number."""


class Hits(NamedTuple):
    """``scores`` (Q, k) float32, best first, and ``ids`` (Q, k) int64, the indices of the documents."""

    scores: Tensor
    ids: Tensor


@dataclass(frozen=True)
class IndexRows:
    """N documents in one code; ``kept`` (N, -) holds their rows."""

    code: Code
    kept: Tensor

    def to(self, device: torch.device | str) -> "IndexRows":
        return IndexRows(self.code.to(device), self.kept.to(device))


@dataclass(frozen=True)
class Index:
    """N documents as coded unit vectors of ``width`` W, made from vectors of ``full_width`` D.

    ``Index.build`` makes one. ``rotation`` (D, W) maps a vector to the W numbers that are kept; without it, the index
    keeps the first W numbers unchanged. ``finer`` holds the same documents in a second code, to rescore the best
    candidates of the coarse rows.
    """

    rows: IndexRows
    full_width: int
    rotation: Tensor | None = None
    finer: IndexRows | None = None
    texts: tuple[str, ...] = ()
    model: str = ""

    @classmethod
    def build(
        cls,
        vectors: Tensor,
        code: str = "int8",
        *,
        width: int | None = None,
        rotate: bool = False,
        bytes: int | None = None,
        finer: str | None = None,
        calibration: Tensor | None = None,
        seed: int = 0,
    ) -> Self:
        """Build an index of ``vectors`` (N, D) float. Deterministic.

        ``code``: float, int8, binary or pq, the last with ``bytes`` per vector. ``width``: keep this many leading
        numbers and rescale them to unit length. ``rotate`` first rotates the principal directions to the front.
        ``finer``: a second code for rescoring candidates. Rotation, ranges and codebooks are fitted on ``calibration``
        (M, D), by default on the vectors themselves. Raises TautError for wrong input.
        """
        if vectors.dim() != 2 or not vectors.shape[1] or not vectors.is_floating_point():
            raise TautError(f"an index is built from float vectors (N, D), not {tuple(vectors.shape)} {vectors.dtype}")
        fitting = vectors if calibration is None else calibration
        if not len(fitting):
            raise TautError("no documents: there are no vectors to fit a code on; give calibration vectors")
        full = vectors.shape[1]
        if fitting.dim() != 2 or fitting.shape[1] != full:
            raise TautError(f"calibration vectors {tuple(fitting.shape)} do not have the width {full} of the documents")
        if not (vectors.isfinite().all() and fitting.isfinite().all()):
            raise TautError("the vectors hold numbers that are not finite")
        kinds = chosen_codes(full, code, width=width, bytes=bytes, finer=finer)
        rotation = principal_directions(fitting)[:, : width or full].contiguous() if rotate else None
        fitting, vectors = (prefix(turned(side.detach().float(), rotation), width) for side in (fitting, vectors))
        rows, again = (
            None if kind is None else _rows(kind.fit(fitting, size, seed), vectors)
            for kind, size in zip(kinds, (bytes, None), strict=True)
        )
        return cls(rows, full, rotation, again)

    def __repr__(self) -> str:
        codes = self.rows.code.name + (f" and {self.finer.code.name}" if self.finer else "")
        size = f"{self.width} of {self.full_width} numbers, {self.bytes_per_vector} bytes each"
        return clip(f"Index({len(self):,} documents in {codes}, {size}{f', by {self.model}' if self.model else ''})")

    def __len__(self) -> int:
        return len(self.rows.kept)

    @property
    def width(self) -> int:
        return self.rows.code.width

    @property
    def bytes_per_vector(self) -> int:
        """Bytes per document, finer rows included, ``shared_bytes`` excluded."""
        return self.rows.code.row_bytes + (self.finer.code.row_bytes if self.finer else 0)

    @property
    def shared_bytes(self) -> int:
        """Bytes of the tensors that all documents share: rotation, ranges, codebooks."""
        return sum(tensor.nbytes for name, tensor in self._tensors().items() if not name.startswith(("rows", "finer")))

    def to(self, device: torch.device | str) -> "Index":
        """The same index on another device."""
        rotation = None if self.rotation is None else self.rotation.to(device)
        return replace(
            self, rows=self.rows.to(device), rotation=rotation, finer=self.finer.to(device) if self.finer else None
        )

    def search(self, queries: Tensor, k: int = 10, *, candidates: int | None = None, symmetric: bool = False) -> Hits:
        """Find the k best documents of each query (Q, D), or all documents if there are fewer.

        Of two documents with equal scores, the earlier comes first. With ``candidates``, that many documents are first
        chosen by the quickest scores (for binary rows the number of bits that differ). Then they are rescored by the
        finer rows, or by the float query if there are no finer rows. The default is 4 * k candidates with finer rows,
        and none without. ``symmetric`` scores binary rows only by the bits that differ. Raises TautError for wrong
        input.

        One pass over the rows in blocks keeps the best of each block: extra memory O(block + k * N / block).
        """
        if k < 1 or (candidates is not None and candidates < k):
            raise TautError(f"search: k = {k}, candidates = {candidates}: expected k >= 1 and candidates >= k")
        if symmetric and (candidates or self.finer):
            raise TautError("search: symmetric scores cannot be rescored; leave out candidates, or use an index "
                            "without finer rows")  # fmt: skip
        queries = self._prepared(queries)
        again = candidates or (CANDIDATES * k if self.finer else None)
        hits = [
            self._search(block, k, again, symmetric or again is not None) for block in queries.split(QUERIES_AT_ONCE)
        ]
        return Hits(*(torch.cat(side) for side in zip(*hits, strict=True)))

    def scores(self, queries: Tensor, *, symmetric: bool = False) -> Tensor:
        """All scores by the coarse rows: queries (Q, D) -> (Q, N) float32. Memory O(Q * N)."""
        return self._score(self._prepared(queries), self.rows.kept, symmetric)

    def describe(self, hits: Hits) -> list[list[dict[str, Any]]]:
        """The hits of each query as ``score``, ``id`` and ``text`` (None if the index keeps no texts)."""
        return [
            [
                {"score": score, "id": number, "text": self.texts[number] if self.texts else None}
                for score, number in zip(scores, ids, strict=True)
            ]
            for scores, ids in zip(hits.scores.tolist(), hits.ids.tolist(), strict=True)
        ]

    def save(self, out: str | Path) -> Path:
        """Write a folder with the facts (json), the tensors (safetensors) and the texts, if any.

        The folder appears complete or not at all. Equal indexes give equal files.
        """
        facts: dict[str, Any] = {
            "format": FORMAT,
            "taut_version": version("taut"),
            "model": self.model,
            "code": self.rows.code.name,
            "finer": self.finer.code.name if self.finer else None,
            "documents": len(self),
            "width": self.width,
            "full_width": self.full_width,
            "rotated": self.rotation is not None,
            "bytes_per_vector": self.bytes_per_vector,
            "shared_bytes": self.shared_bytes,
        }
        with whole_folder(out) as folder:
            (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
            if self.texts:
                (folder / TEXTS).write_text(json.dumps(self.texts, ensure_ascii=False), encoding="utf-8")
            save_file({name: tensor.cpu().contiguous() for name, tensor in self._tensors().items()}, folder / TENSORS)
        return Path(out)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Load what ``save`` wrote, exact to the bit. Raises TautError for a folder that is no index or is damaged."""
        folder = Path(folder)
        facts = read_facts(folder)
        try:
            # Copy the tensors: in the file they may be unaligned, and alignment changes how a product is rounded.
            tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
            texts = json.loads((folder / TEXTS).read_text(encoding="utf-8")) if (folder / TEXTS).is_file() else ()
            rows, finer = (
                _restored(code_named(facts[role]), facts["width"], key, tensors) if facts[role] else None
                for role, key in (("code", "rows"), ("finer", "finer"))
            )
            index = cls(rows, facts["full_width"], tensors.get("rotation"), finer, tuple(texts), facts["model"])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise TautError(f"{folder}: damaged index: {type(error).__name__}: {error}") from None
        if len(index) != facts["documents"] or (index.texts and len(index.texts) != len(index)):
            raise TautError(f"{folder}: damaged index: expected {facts['documents']} documents, found {len(index)}")
        return index

    def _search(self, queries: Tensor, k: int, candidates: int | None, quick: bool) -> Hits:
        wanted = min(candidates or k, len(self))
        values, ids = [], []
        for start in range(0, len(self), ROWS_AT_ONCE):
            scores = self._score(queries, self.rows.kept[start : start + ROWS_AT_ONCE], quick)
            top = scores.topk(min(wanted, scores.shape[1]), sorted=False)
            values.append(top.values)
            ids.append(top.indices + start)
        if not ids:
            return Hits(queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0, dtype=torch.long))
        best = _best(torch.cat(values, 1), torch.cat(ids, 1), wanted)
        return self._again(queries, best.ids, k) if candidates else best

    def _again(self, queries: Tensor, ids: Tensor, k: int) -> Hits:
        """The k best of the candidates (Q, C). Runs one query at a time, because each has different rows."""
        rows = self.finer or self.rows
        scores = torch.empty(ids.shape, device=ids.device)
        for query, candidates, out in zip(queries, ids, scores, strict=True):
            out.copy_(rows.code.scores(query[None], rows.kept[candidates])[0])
        return _best(scores, ids, k)

    def _score(self, queries: Tensor, kept: Tensor, quick: bool) -> Tensor:
        code = self.rows.code
        return code.quick_scores(queries, kept) if quick else code.scores(queries, kept)

    def _prepared(self, queries: Tensor) -> Tensor:
        """Rotate, cut and normalise queries as the documents' vectors were.

        Queries are (Q, D), or (Q, W) if the index has no rotation. Raises TautError for another shape or for numbers
        that are not finite.
        """
        fits = (self.full_width,) if self.rotation is not None else (self.full_width, self.width)
        if queries.dim() != 2 or queries.shape[1] not in fits:
            raise TautError(f"queries {tuple(queries.shape)}: this index expects (Q, {self.full_width})")
        if not queries.isfinite().all():
            raise TautError("the queries hold numbers that are not finite")
        device = self.rows.kept.device
        return prefix(turned(queries.detach().to(device, torch.float32), self.rotation), self.width)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {} if self.rotation is None else {"rotation": self.rotation}
        for key, rows in (("rows", self.rows), ("finer", self.finer)):
            if rows is not None:
                tensors |= {key: rows.kept} | {
                    f"code.{key}.{name}": tensor for name, tensor in rows.code.fitted.items()
                }
        return tensors


def chosen_codes(
    full_width: int, code: str, *, width: int | None = None, bytes: int | None = None, finer: str | None = None
) -> tuple[type[Code], type[Code] | None]:
    """The codes with these names. Raises TautError for options that ``Index.build`` would refuse; needs no vectors."""
    _check_width(width, full_width)
    chosen = code_named(code)
    chosen.bytes_for(width or full_width, bytes)
    if finer is None:
        return chosen, None
    again = code_named(finer)
    again.bytes_for(width or full_width)
    return chosen, again


def prefix(vectors: Tensor, width: int | None = None) -> Tensor:
    """(N, D) -> (N, ``width``): the leading numbers, rescaled to unit length. Zero rows stay zero."""
    _check_width(width, vectors.shape[1])
    return F.normalize(vectors[:, :width], dim=1)


def turned(vectors: Tensor, rotation: Tensor | None) -> Tensor:
    """Apply a rotation, if any: (N, D) and (D, W) -> (N, W)."""
    return vectors if rotation is None else vectors @ rotation


def principal_directions(vectors: Tensor) -> Tensor:
    """(N, D) -> (D, D) orthogonal float32: directions in order of falling mean square. They leave cosines unchanged.

    The vectors are not centred, because that would change the cosines. Deterministic up to the order of equal
    directions. In each column, the number with the largest absolute value is positive.
    """
    unit = F.normalize(vectors.detach().double(), dim=1)
    directions = torch.linalg.eigh(unit.T @ unit / len(unit))[1].flip(1)
    signs = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    return (directions * signs).float()


def _check_width(width: int | None, full: int) -> None:
    if width is not None and not 1 <= width <= full:
        raise TautError(f"width = {width}: expected 1 to {full}, the width of the model's vectors")


def _rows(code: Code, vectors: Tensor) -> IndexRows:
    """Encode in blocks, so that building needs little memory besides vectors and rows."""
    blocks = [code.encode(block) for block in vectors.split(ROWS_AT_ONCE)]
    return IndexRows(code, torch.cat(blocks))


def _restored(kind: type[Code], width: int, key: str, tensors: dict[str, Tensor]) -> IndexRows:
    start = f"code.{key}."
    fitted = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return IndexRows(kind(width, **fitted), tensors[key])


def _best(scores: Tensor, ids: Tensor, k: int) -> Hits:
    """The k best of (Q, C), ordered by falling score, then rising id."""
    by_id = ids.argsort(dim=1)
    scores, ids = scores.gather(1, by_id), ids.gather(1, by_id)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return Hits(scores.gather(1, order), ids.gather(1, order))
