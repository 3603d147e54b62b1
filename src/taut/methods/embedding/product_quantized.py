"""Product-quantised token table: each row is cut into subvectors, and a code names a shared vector for each of them."""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.part import TablePart
from taut.methods.store import Store, stored_bytes
from taut.ops.codebooks.product_codes import CodeLayout, decode_lengths, encode_lengths, lookup, scores
from taut.ops.codebooks.search import assign, decode, refine, search, weighted_error

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that starts at random."""
FREQUENCY_POWER, UNSEEN = 0.75, 0.5
"""A row's weight is (frequency + UNSEEN) ** FREQUENCY_POWER. The power is below 1 because one occurrence of a rare
token has a larger gradient than one of a common token. UNSEEN gives some weight to tokens that the text lacks."""
DAMPING = 0.1
"""Share of the plain squared error in the metric. Gradients describe small errors, but these errors are not small."""
EXPANDED_AT_ONCE = 1 << 19
"""How many numbers of the table the tied head expands at a time."""
FEW_TOKENS, FEW_CODES = 32, 8
"""With more than FEW_TOKENS tokens a head is faster with expanded rows, unless a code stands for FEW_CODES columns."""


class ProductQuantizedKnobs(Knobs):
    subvector: int | None = Field(None, ge=1, description="w, columns per code, a divisor of D; or give keep")
    stages: int = Field(1, ge=1, le=4, description="codes per subvector; their centroids are added")
    centroids: Literal[256, 16] = Field(256, description="vectors a code chooses from; 256 take 8 bits, 16 take 4")
    shared: bool = Field(False, description="one codebook for all subvectors instead of one for each")
    norms: bool = Field(True, description="store the length of each row separately, in one byte")
    weighted: bool = Field(True, description="weight rows by how often calibration text uses them, to the power 0.75")
    metric: bool = Field(True, description="weight directions by their gradients on calibration text")
    relearn: Literal["codebooks", "codes"] = Field(
        "codebooks",
        description="what healing trains besides the lengths: only the codebooks, or also the choice of codes",
    )
    store: Store | None = Field(None, description="keep the codebooks in fewer bits")


class ProductTable(TablePart):
    """A token table whose rows are stored as codes into shared codebooks.

    ``weight`` (V, S, bytes) uint8 holds the codes. ``norms`` (V,) uint8 holds the lengths on a logarithmic scale, or is
    None if they are not stored separately. ``codebooks`` (S x codebooks of a stage, C x w) holds the centroids. A
    subvector is the sum of its S centroids, times the row's length.
    """

    def __init__(
        self,
        site: TableSite,
        layout: CodeLayout,
        knobs: ProductQuantizedKnobs,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(site, dtype)
        self.layout, self.relearn = layout, knobs.relearn
        shape = (site.rows, layout.stages, layout.stage_bytes)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        norms = torch.empty(site.rows, dtype=torch.uint8, device=device) if knobs.norms else None
        self.register_buffer("norms", norms)
        self.hold("codebooks", book_shape(layout), knobs.store, device)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids -> (..., D) of ``dtype``, times ``scale``. Raises IndexError for an id outside the table."""
        flat = ids.reshape(-1)
        vectors = self._rows(flat)
        if self.padding_idx is not None and vectors.requires_grad:
            vectors = torch.where((flat == self.padding_idx)[:, None], vectors.detach(), vectors)
        vectors = vectors.view(*ids.shape, self.embedding_dim)
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V), exact up to rounding.

        Multiplies by the centroids or, piece by piece, by expanded rows, whichever is faster. Gradients need the
        expanded rows.
        """
        flat = hidden.reshape(-1, self.embedding_dim)
        training = torch.is_grad_enabled() and (
            hidden.requires_grad or any(parameter.requires_grad for parameter in self.parameters())
        )
        few = flat.shape[0] <= FEW_TOKENS or self.layout.subvector >= FEW_CODES * self.layout.stages
        plain = flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.float64)
        if training or plain or not few or torch.compiler.is_compiling() or "weight_unpacked" in self._parameters:
            logits = self._expanded(flat, training)
        else:
            logits = scores(flat, self.weight, self._books().to(flat.dtype), self.layout)
            if self.norms is not None:
                logits = logits * self._lengths(None)
        return logits.view(*hidden.shape[:-1], self.num_embeddings)

    def merged(self) -> Tensor:
        """The dense table (V, D) of ``dtype``, without ``scale``."""
        return self._rows(torch.arange(self.num_embeddings, device=self.weight.device))

    def numbers(self) -> int:
        """Returns V D, the dense count, because codes and lengths stand for all rows."""
        return self.num_embeddings * self.embedding_dim

    def unpack(self, original: Tensor | None = None) -> None:
        """Turn lengths and stored codebooks into float parameters.

        With ``relearn: codes`` the rows (V, D) become a parameter too, and a lookup returns their nearest centroids.
        A subvector starts from ``original`` if its codes are the nearest ones to it, else from its decoded value. So
        no code changes at first.
        """
        start = self._start(original) if self.relearn == "codes" else None
        super().unpack(original)
        if self.norms is not None:
            self.norms_unpacked = nn.Parameter(decode_lengths(self.norms, torch.float32))
        if start is not None:
            self.weight_unpacked = nn.Parameter(start)

    @torch.no_grad()
    def repack(self) -> None:
        """Turn the trained parameters back into codes, bytes and stored codebooks."""
        if "weight_unpacked" in self._parameters:
            chosen = self._chosen(self.weight_unpacked, self.weight, self._lengths(None), self._books())
            self.weight.copy_(chosen)
            del self.weight_unpacked
        if "norms_unpacked" in self._parameters:
            self.norms.copy_(encode_lengths(self.norms_unpacked))
            del self.norms_unpacked
        super().repack()

    def _rows(self, ids: Tensor) -> Tensor:
        """(n,) -> (n, D), without ``scale``."""
        books, lengths = self._books(), self._lengths(ids)
        if "weight_unpacked" not in self._parameters:
            return lookup(self.weight, ids, books, self.layout, lengths)
        rows = F.embedding(ids, self.weight_unpacked).to(books.dtype)
        with torch.no_grad():
            packed = self._chosen(rows, self.weight.index_select(0, ids), lengths, books)
        chosen = lookup(packed, torch.arange(ids.numel(), device=ids.device), books, self.layout, lengths)
        # The value is that of the centroids. The gradient reaches the centroids, and passes straight through to rows.
        return chosen + (rows - rows.detach())

    def _chosen(self, rows: Tensor, packed: Tensor, lengths: Tensor | None, books: Tensor) -> Tensor:
        """Packed nearest codes for ``rows`` (n, D). A code of ``packed`` stays unless another is strictly nearer."""
        rows = rows.to(books.dtype)
        if lengths is not None:
            rows = rows / torch.where(lengths == 0, 1.0, lengths)[:, None]
        stored, nearest = self.layout.codes(packed), assign(rows, books, self.layout)
        distances = [self._parts(rows - decode(codes, books)).square().sum(2) for codes in (stored, nearest)]
        return self.layout.pack(torch.where((distances[1] < distances[0])[:, None], nearest, stored))

    @torch.no_grad()
    def _start(self, original: Tensor | None) -> Tensor:
        """(V, D) float32: rows whose nearest codes are the stored ones."""
        decoded = self.merged().float()
        if original is None:
            return decoded.clone()
        chosen = self._chosen(original, self.weight, self._lengths(None), self._books())
        same = (self.layout.codes(chosen) == self.layout.codes(self.weight)).all(1)
        return torch.where(same[..., None], self._parts(original.float()), self._parts(decoded)).flatten(1)

    def _parts(self, rows: Tensor) -> Tensor:
        """(n, D) -> (n, P, w)."""
        return rows.view(-1, self.layout.positions, self.layout.subvector)

    def _books(self) -> Tensor:
        """(S, books, C, w) of ``dtype``."""
        layout = self.layout
        return self.held("codebooks").view(layout.stages, layout.books, layout.centroids, layout.subvector)

    def _lengths(self, ids: Tensor | None) -> Tensor | None:
        """Lengths (n,) of ``dtype`` of the rows ``ids`` (n,); None means all rows. Returns None without lengths."""
        if self.norms is None:
            return None
        unpacked = self._parameters.get("norms_unpacked")
        if unpacked is None:
            return decode_lengths(self.norms if ids is None else self.norms.index_select(0, ids), self.dtype)
        unpacked = unpacked if ids is None else unpacked.index_select(0, ids)
        with torch.no_grad():
            rounding = decode_lengths(encode_lengths(unpacked), unpacked.dtype) - unpacked
        return (unpacked + rounding).to(self.dtype)

    def _expanded(self, hidden: Tensor, training: bool) -> Tensor:
        """(T, D) -> (T, V). In training the backward pass expands rows again instead of keeping them in memory."""

        def piece(start: int, hidden: Tensor) -> Tensor:
            ids = torch.arange(start, min(start + step, self.num_embeddings), device=hidden.device)
            return F.linear(hidden, self._rows(ids).to(hidden.dtype))

        step = max(1, EXPANDED_AT_ONCE // self.embedding_dim)
        starts = range(0, self.num_embeddings, step)
        if training:
            return torch.cat([checkpoint(piece, start, hidden, use_reentrant=False) for start in starts], 1)
        return torch.cat([piece(start, hidden) for start in starts], 1)

    def extra_repr(self) -> str:
        layout = self.layout
        return (
            f"{self.num_embeddings}, {layout.width}, subvector={layout.subvector}, stages={layout.stages}, "
            f"centroids={layout.centroids}, shared={layout.shared}, dtype={self.dtype}"
        )


def book_shape(layout: CodeLayout) -> tuple[int, int]:
    """Shape of ``codebooks``: a row for each codebook, so that a stored codebook has one scale."""
    return layout.stages * layout.books, layout.centroids * layout.subvector


class ProductQuantizedEmbedding(EmbeddingMethod):
    """Product quantisation by k-means, or with learned codes (``relearn: codes``). ``keep`` counts stored bytes."""

    id = "embedding.product_quantized"
    summary = "a code for each subvector (product and residual quantisation, DPQ): 0.5 to 2 bits per number"
    source = (
        "Jegou et al. 2011, Product Quantization (TPAMI 33); residual stages after Chen et al. 2010 (Sensors 10); "
        "learned codes after Chen et al. 2020, DPQ-VQ (arXiv 1908.09756). Changed: lengths are stored separately, rows "
        "are weighted by use and directions by gradients, codes and codebooks are fitted in rounds, and in training "
        "the same loss trains both rows (straight through) and centroids"
    )
    Knobs = ProductQuantizedKnobs
    dial = "subvector"

    @property
    def needs(self) -> frozenset[str]:
        statistics = {"frequency": self.knobs.weighted, "metric": self.knobs.metric}
        return frozenset(name for name, used in statistics.items() if used)

    @property
    def subvector(self) -> int:
        if self.knobs.subvector is None:
            raise TautError(f"{self.id}: give keep or subvector")
        return self.knobs.subvector

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        if site.width % self.subvector:
            nearest = min(divisors(site.width), key=lambda divisor: abs(divisor - self.subvector))
            return (
                f"subvector {self.subvector} does not divide the width {site.width}; the nearest that does is {nearest}"
            )
        if self.knobs.centroids >= site.rows:
            advice = "; use centroids: 16" if site.rows > 16 else ""
            return f"{self.knobs.centroids} centroids do not reduce a table of {site.rows} rows{advice}"
        return None

    def solve(self, site: TableSite, keep: float) -> "ProductQuantizedEmbedding":
        """Choose the shortest subvectors whose codes, codebooks and lengths take at most ``keep`` of the dense bytes.

        Raises TautError if none do.
        """
        shares = {}
        for subvector in divisors(site.width):
            method = type(self)(self.knobs.model_copy(update={"subvector": subvector}))
            reason = method.fits(site)
            if reason is not None:
                raise TautError(f"{self.id}: {site.name}: {reason}")
            shares[subvector] = method.predict(site).bytes / site.dense().bytes
            if shares[subvector] <= keep:
                return method
        raise TautError(
            f"{self.id}: keep = {keep} is too little at {site.name}: the least is {min(shares.values()):.2g}"
        )

    def predict(self, site: TableSite) -> Cost:
        """FLOPs are those of few tokens: a head multiplies by every centroid. Its additions are not counted."""
        layout, rows = self._layout(site), site.rows
        stored = rows * (layout.stages * layout.stage_bytes + self.knobs.norms)
        stored += stored_bytes(book_shape(layout), self.knobs.store, site.width_in_bytes)
        flops = 2.0 * layout.stages * layout.centroids * site.width * len(site.heads)
        return Cost(rows * site.width, stored, flops)

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> ProductTable:
        layout = self._layout(site)
        part = ProductTable(site, layout, self.knobs, device, dtype)
        if device.type == "meta":
            return part
        books = torch.randn(book_shape(layout), device=device) * (STANDARD_DEVIATION / math.sqrt(layout.stages))
        codes = torch.randint(layout.centroids, (site.rows, layout.stages, layout.positions), device=device)
        lengths = torch.ones(site.rows, device=device)
        if site.padding_row is not None:
            lengths[site.padding_row] = 0
            if part.norms is None:
                codes[site.padding_row] = 0
                books.view(-1, layout.centroids, layout.subvector)[:, 0] = 0
        part.fill("codebooks", books)
        part.weight.copy_(layout.pack(codes))
        if part.norms is not None:
            part.norms.copy_(encode_lengths(lengths))
        return part

    @torch.no_grad()
    def fit(self, part: ProductTable, weight: Tensor, calibration: Calibration) -> None:
        """Fit codes, codebooks and lengths to ``weight`` (V, D).

        All rows weigh the same without frequencies, all directions without a metric. Raises TautError for numbers that
        are not finite.
        """
        if not weight.isfinite().all():
            raise TautError(f"{self.id}: the token table holds numbers that are not finite; repair it first")
        table = weight if weight.dtype == torch.float64 else weight.float()
        counts, metric = torch.ones_like(table[:, 0]), None
        if self.knobs.weighted and calibration.frequency is not None:
            counts = (calibration.frequency.to(table) + UNSEEN) ** FREQUENCY_POWER
        if self.knobs.metric and calibration.metric is not None:
            metric = damped(calibration.metric.to(table))
        layout, top, rows = part.layout, 1.0, table
        if part.norms is not None:
            lengths = table.norm(dim=1)
            # The codebooks carry the length of the longest row, so that all lengths lie within the logarithmic scale.
            top = float(lengths.max()) or 1.0
            rows = table / torch.where(lengths == 0, 1.0, lengths)[:, None]
            counts = counts * lengths.square()
        counts = counts.clamp_min(counts.max() * 1e-9 + torch.finfo(counts.dtype).tiny)
        generator = torch.Generator().manual_seed(calibration.seed)
        codes, books = search(rows, counts, metric, layout, generator)
        part.fill("codebooks", books * top)
        if self.knobs.store is not None:
            # Storing rounds the codebooks, so choose the codes for the rounded ones.
            books = part._books().to(table) / top
            codes, _ = refine(rows, counts, metric, layout, codes, books, update=False)
        part.weight.copy_(layout.pack(codes))
        if part.norms is not None:
            # Least squares: the best length for the decoded row.
            decoded = decode(codes, books)
            weighted = decoded if metric is None else decoded @ metric
            lengths = lengths * (rows * weighted).sum(1) / weighted_error(decoded, metric).clamp_min(1e-12)
            part.norms.copy_(encode_lengths(lengths / top))

    def _layout(self, site: TableSite) -> CodeLayout:
        knobs = self.knobs
        return CodeLayout(site.width, self.subvector, knobs.stages, knobs.centroids, knobs.shared)


def damped(metric: Tensor) -> Tensor:
    """Scale ``metric`` (D, D) to a mean of 1 on the diagonal and make it positive definite."""
    unit = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    mean = metric.diagonal().mean()
    return unit if mean <= 0 else (metric / mean + DAMPING * unit) / (1 + DAMPING)


def divisors(width: int) -> list[int]:
    """All divisors of ``width``, ascending."""
    return [size for size in range(1, width + 1) if width % size == 0]
