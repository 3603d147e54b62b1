"""A token table whose leading columns are smaller tables: rotated so that the first columns carry the most."""

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
"""Of the entries of the table when it is trained from scratch."""


class MatryoshkaKnobs(Knobs):
    width: int | None = Field(None, ge=1, description="R, how many rotated columns are stored; or give keep")
    prefixes: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0), description="shares of R that are tables of their own; rising, the last is 1"
    )
    nested: bool = Field(False, description="in training, healing included, every lookup draws one of the prefixes")
    weighted: bool = Field(
        False, description="weigh each row's error by one more than how often calibration text uses it"
    )
    store: Store | None = Field(None, description="keep the columns and the rotation in fewer bits")

    @field_validator("prefixes")
    @classmethod
    def _rising(cls, prefixes: tuple[float, ...]) -> tuple[float, ...]:
        if not prefixes or prefixes[0] <= 0 or prefixes[-1] != 1 or any(a >= b for a, b in pairwise(prefixes)):
            raise ValueError("expected rising shares above 0 that end with 1, such as [0.25, 0.5, 1.0]")
        return prefixes


class MatryoshkaTable(TablePart):
    """``widths``: how many columns each prefix has, rising to R. ``used``: how many are read now, one of them.

    The columns are stored in bands, from one width to the next: ``weight`` (V, first width) and ``band_1`` (V,
    second - first), ..., so that a prefix reads nothing beyond itself, and a ``store`` gives every band scales of its
    own. ``projection`` (R, D) rotates back; its rows are orthonormal after a fit.
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
        """Tensor name and columns (first, behind the last) of every band."""
        edges = pairwise((0, *self.widths))
        return {f"band_{band}" if band else "weight": edge for band, edge in enumerate(edges)}

    def use(self, width: int) -> None:
        """From now on read the first ``width`` columns alone: cheaper and coarser, and nothing stored changes.

        Raises TautError for a width that is no prefix.
        """
        if width not in self.widths:
            nearest = min(self.widths, key=lambda known: abs(known - width))
            raise TautError(f"width {width} is no prefix of this table: {list(self.widths)}; the nearest is {nearest}")
        self.used = width

    def forward(self, ids: Tensor) -> Tensor:
        """(...) ids -> (..., D), times ``scale``: the coordinates of the prefix in use, rotated back."""
        if self.training and self.nested:
            self._draw()
        columns = [self.held_rows(name, ids, self.padding_idx) for name in self._read()]
        vectors = self._prefix(torch.cat(columns, dim=-1)) @ self.held("projection")[: self.used]
        return vectors if self.scale == 1.0 else vectors * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) -> (..., V): the hidden state rotated, then scored band by band. In nested training the prefix is
        that of the lookup before."""
        rotated = self._prefix(F.linear(hidden, self.held("projection")[: self.used])).flatten(0, -2)
        scores = None
        for name, (start, stop) in self._read().items():
            columns, table = rotated[:, start:stop], self.held(name).T
            scores = columns @ table if scores is None else torch.addmm(scores, columns, table)
        return scores.view(*hidden.shape[:-1], self.num_embeddings)

    def merged(self) -> Tensor:
        """(V, D), without ``scale``, of the prefix in use."""
        return torch.cat([self.held(name) for name in self._read()], dim=1) @ self.held("projection")[: self.used]

    def _read(self) -> dict[str, tuple[int, int]]:
        return {name: edge for name, edge in self.bands().items() if edge[1] <= self.used}

    def _draw(self) -> None:
        """The prefix of this lookup and of the logits that follow: the same sequence in every run and every copy."""
        generator = torch.Generator().manual_seed(self.random_step)
        self.drawn = self.widths[int(torch.randint(len(self.widths), (), generator=generator))]
        self.random_step += 1

    def _prefix(self, coordinates: Tensor) -> Tensor:
        """(..., R), those behind the drawn prefix zero; a product, so that every parameter still gets a gradient."""
        if not (self.training and self.nested) or self.drawn >= self.used:
            return coordinates
        return coordinates * (torch.arange(self.used, device=coordinates.device) < self.drawn)


class MatryoshkaEmbedding(EmbeddingMethod):
    """The table in the basis of its principal directions. ``keep`` counts its stored bytes."""

    id = "embedding.matryoshka"
    summary = "a rotated table whose leading columns are tables themselves: shorter prefixes can be used at run time"
    source = (
        "Kusupati et al. 2022, Matryoshka Representation Learning (arXiv 2205.13147). Changed: applied to the table "
        "instead of the sentence vector; fitted after training by principal directions; one prefix is drawn for each "
        "call instead of summing the loss over all (the same in expectation; cf. Rippel et al. 2014, nested dropout)"
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
        """The prefixes in columns; those that round to the same number count once."""
        return tuple(sorted({max(1, round(share * self.width)) for share in self.knobs.prefixes}))

    def fits(self, site: Site) -> str | None:
        if not isinstance(site, TableSite):
            return f"{site.name} is not a token table"
        limit = math.ceil(site.rows * site.width / (site.rows + site.width)) - 1
        if self.width <= limit:
            return None
        return f"width {self.width} is no reduction of {site.rows} x {site.width}: with its rotation at most {limit} is"

    def solve(self, site: TableSite, keep: float) -> "MatryoshkaEmbedding":
        """The greatest R whose columns and rotation, as they are stored, take at most ``keep`` of the dense bytes."""
        # Rounding may move one column between bands, so that the bytes of neighbours are not strictly in order.
        return self.greatest(site, keep, range(1, min(site.rows, site.width)))

    def predict(self, site: TableSite) -> Cost:
        """At full width; a shorter prefix in use costs its share."""
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
            # Orthonormal rows of the rotation scale the variance of what is stored by R / D.
            deviation = STANDARD_DEVIATION * math.sqrt(site.width / self.width)
            columns = torch.randn(site.rows, self.width, device=device) * deviation
            if site.padding_row is not None:
                columns[site.padding_row] = 0
            rotation = nn.init.orthogonal_(torch.empty(self.width, site.width, device=device))
            self._fill(part, columns, rotation)
        return part

    @torch.no_grad()
    def fit(self, part: MatryoshkaTable, weight: Tensor, calibration: Calibration) -> None:
        """The R directions with the most (weighted) energy, most first; so every prefix is the best of its width.
        Raises TautError when ``weighted`` is set and no frequencies were given."""
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
