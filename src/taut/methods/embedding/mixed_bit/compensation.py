"""Compensate a row's rounding error by a multiple of another row: an index and a coefficient in three bytes."""

import torch
from torch import Tensor

RECORD_BYTES = 3
"""An index of 16 bits and a coefficient of 8 bits, in units of a scale that many records share."""
MOST_ROWS = 1 << 16
"""An index reaches only this many rows, the first of the dictionary."""
COMPARED_AT_ONCE = 1 << 24
"""How many products of residuals and dictionary rows are held at a time."""


def match(residual: Tensor, dictionary: Tensor) -> tuple[Tensor, Tensor]:
    """For each residual (n, D) find the best row of ``dictionary`` (K, D), K >= 1.

    Returns the rows (n,) int64 and their coefficients (n,) float32. The best row has the greatest squared cosine, so
    the smallest error remains.
    """
    dictionary = dictionary[:MOST_ROWS].float()
    norms = dictionary.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    unit = dictionary / norms[:, None]
    matches = []
    for piece in residual.float().split(max(1, COMPARED_AT_ONCE // len(unit))):
        products = piece @ unit.T
        best = products.abs().argmax(1)
        matches.append((best, products.gather(1, best[:, None])[:, 0] / norms[best]))
    rows, coefficients = (torch.cat(parts) for parts in zip(*matches, strict=True))
    return rows, coefficients


def pack_records(rows: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """Pack (n,) rows and (n,) coefficients into records (n, ``RECORD_BYTES``) uint8 and their scale (4,) uint8."""
    scale = coefficients.abs().amax().float() / 127 if len(coefficients) else coefficients.new_zeros(())
    codes = (coefficients / torch.where(scale == 0, 1.0, scale)).round().to(torch.int8)
    records = torch.stack((rows & 255, rows >> 8), dim=1).to(torch.uint8)
    return torch.cat((records, codes.view(torch.uint8)[:, None]), dim=1), scale.reshape(1).view(torch.uint8)


def unpack_records(records: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of ``pack_records``: (n,) int64 rows and (n,) float32 coefficients."""
    low, high, codes = records.unbind(1)
    # Copies, because a view as another type needs an aligned start.
    return low.long() + 256 * high.long(), codes.clone().view(torch.int8).float() * scale.clone().view(torch.float32)
