"""A token table of shared buckets: each row is a weighted sum of the few buckets that hash functions choose for it."""

import math

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.embedding.hashed.hashing import best_weights, fit_buckets, hashed
from taut.methods.part import TablePart
from taut.methods.store import Store, stored_bytes

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that is trained from scratch."""
TOKENS = 32
"""With a store, the importance weights of this many tokens share a row, and so a scale."""
IMPORTANCE_BITS = 6
"""The fewest bits of a stored importance weight, because rounding one moves a whole row."""
STEPS = 3
"""Steps of conjugate gradients in each round of the fit."""


class HashedKnobs(Knobs):
    buckets: int | None = Field(None, ge=1, lt=2**31, description="B, rows of the shared table; below V; or give keep")
    hashes: int = Field(4, ge=1, le=16, description="k, hash functions and importance weights per token")
    rounds: int = Field(20, ge=1, description="rounds of the fit: buckets for given weights, then weights for buckets")
    weighted: bool = Field(
        False, description="weight each row's error by the root of (its count in calibration text + 1)"
    )
    store: Store | None = Field(
        None, description="keep buckets and importance weights in fewer bits, the weights in at least 6"
    )


class HashedTable(TablePart):
    """A token table whose rows are weighted sums of shared buckets.

    ``weight`` (B, D) holds the buckets. ``importance`` holds k weights per token: (V, k), or (ceil(V / 32), 32 k) with
    a store, so that 32 tokens share a scale. The buckets of a token are computed, not stored.
    """

    def __init__(
        self, site: TableSite, buckets: int, hashes: int, store: Store | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(site, dtype)
        self.buckets, self.hashes, self.together = buckets, hashes, _together(store)
        self.hold("weight", (buckets, site.width), store, device)
        self.hold("importance", _importance_shape(site, hashes, store), _importance_store(store), device)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D), weighted sums of k buckets, times ``scale``.

        Raises IndexError for an id outside the table (on CUDA the device asserts).
        """
        rows = self.held_rows("weight", hashed(ids, self.hashes, self.buckets))
        vectors = (rows * self._importance(ids)[..., None]).sum(-2)
        if self.padding_idx is not None and torch.is_grad_enabled():
            vectors = torch.where((ids == self.padding_idx)[..., None], vectors.detach(), vectors)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V).

        Scores the B buckets, then sums the weighted scores of each token's buckets: B D multiplications per hidden
        state instead of V D.
        """
        scores = F.linear(hidden, self.held("weight"))
        index, weights = self._index(hidden.device), self._weights()
        total = scores.index_select(-1, index[:, 0]) * weights[:, 0]
        for place in range(1, self.hashes):
            total = torch.addcmul(total, scores.index_select(-1, index[:, place]), weights[:, place])
        return total

    def merged(self) -> Tensor:
        """The dense table (V, D), without ``scale``."""
        weights, buckets = self._weights(), self.held("weight")
        index = self._index(buckets.device)
        return sum(buckets[index[:, place]] * weights[:, place, None] for place in range(self.hashes))

    def _importance(self, ids: Tensor) -> Tensor:
        """The importance weights of tokens: (...) ids -> (..., k)."""
        if self.together == 1:
            return self.held_rows("importance", ids)
        # The last row is padded beyond V, so an id from V on must become invalid here.
        checked = torch.where(ids < self.num_embeddings, ids, -1).long()
        rows = self.held_rows("importance", checked // self.together).unflatten(-1, (self.together, self.hashes))
        within = (checked % self.together)[..., None, None].expand(*ids.shape, 1, self.hashes)
        return rows.gather(-2, within).squeeze(-2)

    def _index(self, device: torch.device) -> Tensor:
        """The buckets of all tokens, (V, k) int64."""
        return hashed(torch.arange(self.num_embeddings, device=device), self.hashes, self.buckets)

    def _weights(self) -> Tensor:
        """The importance weights of all tokens, (V, k)."""
        return self.held("importance").reshape(-1, self.hashes)[: self.num_embeddings]


class HashedEmbedding(EmbeddingMethod):
    """Hash embeddings fitted to a trained table. ``keep`` counts stored bytes."""

    id = "embedding.hashed"
    summary = "shared buckets chosen by hash functions, a few importance weights per token; a tied head gets cheaper"
    source = (
        "Svenstrup, Hansen and Winther 2017, Hash Embeddings for Efficient Word Representations (arXiv 1709.03933). "
        "Changed: fitted to a trained table by alternating least squares; importance weights are neither shared "
        "between tokens nor appended to the vector; a tied head scores the buckets"
    )
    Knobs = HashedKnobs
    dial = "buckets"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"frequency"} if self.knobs.weighted else ())

    @property
    def buckets(self) -> int:
        if self.knobs.buckets is None:
            raise TautError(f"{self.id}: give keep or buckets")
        return self.knobs.buckets

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        limit = self._limit(site)
        if limit < 1:
            return f"{self.knobs.hashes} weights per token do not reduce rows of {site.width} numbers"
        if self.buckets > limit:
            return (
                f"{self.buckets} buckets and {self.knobs.hashes} weights per token do not reduce "
                f"{site.rows} x {site.width}: give at most {limit} buckets"
            )
        return None

    def solve(self, site: TableSite, keep: float) -> "HashedEmbedding":
        """Choose the most buckets that, stored with their weights, take at most ``keep`` of the dense table's bytes."""
        return self.greatest(site, keep, range(1, self._limit(site) + 1))

    def predict(self, site: TableSite) -> Cost:
        numbers = self.buckets * site.width + math.prod(self._importance_shape(site))
        # Sums of gathered rows are not matrix products. Like the dense lookup they count as zero FLOPs.
        flops = 2.0 * self.buckets * site.width * len(site.heads)
        return Cost(numbers, self._bytes(site, self.buckets), flops)

    def _limit(self, site: TableSite) -> int:
        """The most buckets with which the part has fewer numbers than the dense table."""
        return (site.rows * site.width - math.prod(self._importance_shape(site)) - 1) // site.width

    def _importance_shape(self, site: TableSite) -> tuple[int, int]:
        return _importance_shape(site, self.knobs.hashes, self.knobs.store)

    def _bytes(self, site: TableSite, buckets: int) -> int:
        store, width = self.knobs.store, site.width_in_bytes
        importance = stored_bytes(self._importance_shape(site), _importance_store(store), width)
        return stored_bytes((buckets, site.width), store, width) + importance

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> HashedTable:
        part = HashedTable(site, self.buckets, self.knobs.hashes, self.knobs.store, device, dtype)
        if device.type != "meta":
            # A row is the sum of k independent products, and the weights have variance one.
            deviation = STANDARD_DEVIATION / math.sqrt(self.knobs.hashes)
            part.fill("weight", torch.randn(self.buckets, site.width, device=device) * deviation)
            weights = torch.randn(site.rows, self.knobs.hashes, device=device)
            if site.padding_row is not None:
                weights[site.padding_row] = 0
            self._fill_importance(part, weights)
        return part

    @torch.no_grad()
    def fit(self, part: HashedTable, weight: Tensor, calibration: Calibration) -> None:
        """Fit buckets and weights by alternating least squares, then the weights again for the buckets as stored.

        Raises TautError when ``weighted`` is set and there are no frequencies.
        """
        importance = None
        if self.knobs.weighted:
            if calibration.frequency is None:
                raise TautError(f"{self.id}: weighted needs token frequencies; give calibration text or drop the knob")
            importance = (calibration.frequency + 1).sqrt()
        table = weight if weight.dtype == torch.float64 else weight.float()
        index = hashed(torch.arange(len(table), device=table.device), part.hashes, part.buckets)
        buckets, _, _ = fit_buckets(table, index, part.buckets, importance, self.knobs.rounds, STEPS, calibration.seed)
        part.fill("weight", buckets)
        self._fill_importance(part, best_weights(table, part.held("weight").to(table), index))

    def _fill_importance(self, part: HashedTable, weights: Tensor) -> None:
        """Store the weights (V, k). Padding of the last row repeats the last token, so as not to widen its range."""
        missing = -len(weights) % part.together
        part.fill("importance", torch.cat([weights, weights[-1:].expand(missing, -1)]))


def _together(store: Store | None) -> int:
    return 1 if store is None else TOKENS


def _importance_shape(site: TableSite, hashes: int, store: Store | None) -> tuple[int, int]:
    together = _together(store)
    return -(-site.rows // together), together * hashes


def _importance_store(store: Store | None) -> Store | None:
    return store and Store(bits=max(store.bits, IMPORTANCE_BITS), clip=store.clip)
