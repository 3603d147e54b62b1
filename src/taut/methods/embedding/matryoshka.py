"""A token table whose leading columns are usable as smaller tables: a rotation puts the most energy into them."""

import math
from itertools import pairwise

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from taut.core.cost import Cost
from taut.core.errors import TautError
from taut.core.site import Site, TableSite
from taut.methods.base import Calibration, EmbeddingMethod, Knobs
from taut.methods.part import TablePart
from taut.methods.store import Store, stored_bytes
from taut.ops.factors.svd import leading_directions

STANDARD_DEVIATION = 0.02
"""Standard deviation of the entries of a table that is trained from scratch."""


class MatryoshkaKnobs(Knobs):
    width: int | None = Field(None, ge=1, description="R, how many rotated columns are stored; or give keep")
    prefixes: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0), description="shares of R usable as smaller tables; ascending, the last is 1"
    )
    nested: bool = Field(False, description="in training and healing, each lookup uses a random prefix")
    weighted: bool = Field(False, description="weight each row's error by (its count in calibration text + 1)")
    store: Store | None = Field(None, description="keep the columns and the rotation in fewer bits")

    @field_validator("prefixes")
    @classmethod
    def _rising(cls, prefixes: tuple[float, ...]) -> tuple[float, ...]:
        if not prefixes or prefixes[0] <= 0 or prefixes[-1] != 1 or any(a >= b for a, b in pairwise(prefixes)):
            raise ValueError("expected ascending shares above 0 that end with 1, such as [0.25, 0.5, 1.0]")
        return prefixes


class MatryoshkaTable(TablePart):
    """A rotated token table whose first columns can be used alone.

    ``widths`` are the numbers of columns of the prefixes, ascending to R. ``used`` is the one in use.
    The columns are stored in bands from one width to the next: ``weight`` (V, first width), ``band_1`` (V, second -
    first), and so on. So a prefix reads only its own columns, and with ``store`` each band has its own scales.
    ``projection`` (R, D) rotates back; its rows are orthonormal after a fit.
    """

    def __init__(
        self,
        site: TableSite,
        widths: tuple[int, ...],
        nested: bool,
        store: Store | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(site, dtype)
        self.widths, self.used, self.nested = widths, widths[-1], nested
        self.drawn = widths[-1]
        for name, (start, stop) in self.bands().items():
            self.hold(name, (site.rows, stop - start), store, device)
        self.hold("projection", (widths[-1], site.width), store, device)

    def bands(self) -> dict[str, tuple[int, int]]:
        """Map the tensor name of each band to its columns (start, stop)."""
        edges = pairwise((0, *self.widths))
        return {f"band_{band}" if band else "weight": edge for band, edge in enumerate(edges)}

    def use(self, width: int) -> None:
        """From now on read only the first ``width`` columns, which is cheaper and coarser. No stored value changes.

        Raises TautError for a width that is not one of ``widths``.
        """
        if width not in self.widths:
            nearest = min(self.widths, key=lambda prefix: abs(prefix - width))
            raise TautError(
                f"width {width} is not a prefix of this table {list(self.widths)}; the nearest is {nearest}"
            )
        self.used = width

    def forward(self, ids: Tensor) -> Tensor:
        """Look up vectors: (...) ids -> (..., D), times ``scale``. Rotates the columns of the prefix in use back."""
        if self.training and self.nested:
            self._draw()
        columns = [self.held_rows(name, ids, self.padding_idx) for name in self._read()]
        vectors = self._prefix(torch.cat(columns, dim=-1)) @ self.held("projection")[: self.used]
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the tied head: (..., D) -> (..., V). Rotates the hidden state, then scores it band by band.

        In training with ``nested`` it uses the same prefix as the lookup before it.
        """
        rotated = self._prefix(F.linear(hidden, self.held("projection")[: self.used])).flatten(0, -2)
        scores = None
        for name, (start, stop) in self._read().items():
            columns, table = rotated[:, start:stop], self.held(name).T
            scores = columns @ table if scores is None else torch.addmm(scores, columns, table)
        return scores.view(*hidden.shape[:-1], self.num_embeddings)

    def merged(self) -> Tensor:
        """The dense table (V, D) of the prefix in use, without ``scale``."""
        return torch.cat([self.held(name) for name in self._read()], dim=1) @ self.held("projection")[: self.used]

    def _read(self) -> dict[str, tuple[int, int]]:
        return {name: edge for name, edge in self.bands().items() if edge[1] <= self.used}

    def _draw(self) -> None:
        """Choose the prefix of this lookup and of the logits that follow. Every run and copy has the same sequence."""
        generator = torch.Generator().manual_seed(self.random_step)
        self.drawn = self.widths[int(torch.randint(len(self.widths), (), generator=generator))]
        self.random_step += 1

    def _prefix(self, coordinates: Tensor) -> Tensor:
        """Zero the coordinates (..., R) beyond the random prefix, by a product so that all parameters get gradients."""
        if not (self.training and self.nested) or self.drawn >= self.used:
            return coordinates
        return coordinates * (torch.arange(self.used, device=coordinates.device) < self.drawn)


class MatryoshkaEmbedding(EmbeddingMethod):
    """Rotates the table to its principal directions. ``keep`` counts its stored bytes."""

    id = "embedding.matryoshka"
    summary = "a rotated table whose leading columns work as smaller tables: choose a shorter prefix at run time"
    source = (
        "Kusupati et al. 2022, Matryoshka Representation Learning (arXiv 2205.13147). Changed: applied to the table "
        "instead of the sentence vector; fitted after training by principal directions; each call uses one random "
        "prefix instead of summing the loss over all (the same in expectation; cf. Rippel et al. 2014, nested dropout)"
    )
    Knobs = MatryoshkaKnobs
    dial = "width"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"frequency"} if self.knobs.weighted else ())

    @property
    def width(self) -> int:
        if self.knobs.width is None:
            raise TautError(f"{self.id}: give keep or width")
        return self.knobs.width

    @property
    def widths(self) -> tuple[int, ...]:
        """The prefixes as numbers of columns, without duplicates from rounding."""
        return tuple(sorted({max(1, round(share * self.width)) for share in self.knobs.prefixes}))

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        limit = math.ceil(site.rows * site.width / (site.rows + site.width)) - 1
        if self.width <= limit:
            return None
        return f"width {self.width} and its rotation do not reduce {site.rows} x {site.width}: give at most {limit}"

    def solve(self, site: TableSite, keep: float) -> "MatryoshkaEmbedding":
        """Choose the greatest R whose stored columns and rotation take at most ``keep`` of the dense bytes."""
        # Rounding may move one column between bands, so the bytes of neighbouring widths need not ascend strictly.
        return self.greatest(site, keep, range(1, min(site.rows, site.width)))

    def predict(self, site: TableSite) -> Cost:
        """The cost at full width. A shorter prefix costs its share."""
        shapes = [(site.rows, stop - start) for start, stop in pairwise((0, *self.widths))]
        shapes.append((self.width, site.width))
        numbers = self.width * (site.rows + site.width)
        stored = sum(stored_bytes(shape, self.knobs.store, site.width_in_bytes) for shape in shapes)
        flops = 2.0 * self.width * site.width + 2.0 * numbers * len(site.heads)
        return Cost(numbers, stored, flops)

    @torch.no_grad()
    def build(self, site: TableSite, device: torch.device, dtype: torch.dtype) -> MatryoshkaTable:
        part = MatryoshkaTable(site, self.widths, self.knobs.nested, self.knobs.store, device, dtype)
        if device.type != "meta":
            # The rotation has orthonormal rows, so the variance of the table is R / D times that of the columns.
            deviation = STANDARD_DEVIATION * math.sqrt(site.width / self.width)
            columns = torch.randn(site.rows, self.width, device=device) * deviation
            if site.padding_row is not None:
                columns[site.padding_row] = 0
            rotation = nn.init.orthogonal_(torch.empty(self.width, site.width, device=device))
            self._fill(part, columns, rotation)
        return part

    @torch.no_grad()
    def fit(self, part: MatryoshkaTable, weight: Tensor, calibration: Calibration) -> None:
        """Project the rows onto the R directions with the most (weighted) energy, in descending order.

        So every prefix is the best one of its width. Raises TautError when ``weighted`` is set and there are no
        frequencies.
        """
        table = weight.double()
        rows = table
        if self.knobs.weighted:
            if calibration.frequency is None:
                raise TautError(f"{self.id}: weighted needs token frequencies; give calibration text or drop the knob")
            rows = table * (calibration.frequency.to(table) + 1)[:, None]
        _, directions = leading_directions(table.T @ rows, part.widths[-1])
        self._fill(part, table @ directions, directions.T)

    def _fill(self, part: MatryoshkaTable, columns: Tensor, rotation: Tensor) -> None:
        for name, (start, stop) in part.bands().items():
            part.fill(name, columns[:, start:stop])
        part.fill("projection", rotation)
