"""``ops.tables.bands`` for a module: the places of its rows, computed again when its packed classes change."""

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.ops.tables.bands import places


@dataclass(frozen=True)
class RowPlaces:
    """For V rows: the class of each (V,) uint8, its rank within the class (V,) int32, and all rows (V,) int64 ordered
    by class."""

    classes: Tensor
    offsets: Tensor
    order: Tensor

    def undo(self, values: Tensor, dim: int) -> Tensor:
        """V values along ``dim``, ordered by class -> in the order of the rows."""
        place = torch.empty_like(self.order)
        place[self.order] = torch.arange(len(place), device=place.device)
        return values.index_select(dim, place)


class RowMap:
    """The places of ``rows`` V rows in ``count`` classes. They take 13 bytes per row and are not stored."""

    def __init__(self, rows: int, count: int) -> None:
        self.rows, self.count = rows, count
        self._source: Tensor | None = None
        self._state = (0, 0)
        self._places: RowPlaces | None = None

    def __call__(self, packed: Tensor) -> RowPlaces:
        """The places for packed classes (``bands.pack_classes``). They are cached until the tensor, its memory or its
        values change, as by loading, ``.to()`` or ``copy.deepcopy``."""
        state = (packed.data_ptr(), 0 if packed.is_inference() else packed._version)
        if self._places is None or self._source is not packed or self._state != state:
            classes, offsets = places(packed, self.count, self.rows)
            self._source, self._state = packed, state
            self._places = RowPlaces(classes, offsets, classes.argsort(stable=True))
        return self._places
