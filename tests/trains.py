"""Small tensor-train tables, for the tests of the method and of its kernels."""

import torch
from torch import Tensor

from taut.core.site import TableSite
from taut.methods.base import Calibration
from taut.methods.embedding.tensor_train.method import TensorTrainEmbedding

ROWS, WIDTH = 57, 24


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def site(rows: int = ROWS, width: int = WIDTH, dtype: str = "float64", **fields) -> TableSite:
    return TableSite(slot="embedding", path="embed", dtype=dtype, rows=rows, width=width, **fields)


def counts(rows: int = ROWS) -> Calibration:
    """Steeply falling with a permuted id, some never seen."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(5))
    return Calibration(frequency=(200.0 / (order + 1)).floor().double())


def method(**knobs) -> TensorTrainEmbedding:
    return TensorTrainEmbedding.parse(knobs)


def fitted(way: TensorTrainEmbedding, place: TableSite, weight: Tensor, calibration: Calibration | None = None):
    part = way.build(place, torch.device("cpu"), weight.dtype)
    way.fit(part, weight, calibration or counts(place.rows))
    return part
