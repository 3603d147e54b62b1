"""Error-compensated rounding of a linear map: later columns make up for the rounding error of earlier ones.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323), an exact and fast form of Optimal Brain Quantization. Columns are
rounded in falling order of their input's energy (the authors' ``act-order``). All scales are chosen before the first
column is rounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from taut.core.errors import TautError

DAMPING = 0.01
"""Share of the mean input energy that is added to every input's energy, as in the authors' code. It keeps the inverse
of the Gram matrix from fitting the little text that was seen."""
COLUMNS_AT_ONCE = 64
"""After this many columns, one matrix product updates all later columns."""


def compensate(weight: Tensor, gram: Tensor, rounded: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return the numbers that, rounded to nearest, give the compensated map.

    ``weight`` (M, N) float and ``gram`` (N, N), the mean of x x^T over its inputs -> (M, N) float64. ``rounded`` rounds
    one column: (M,) float64 and its index -> (M,), by the rule with which the caller will round the result. ``gram``
    may be singular; a ``gram`` of zeros leaves the weight unchanged. Deterministic. Raises TautError for a Gram matrix
    of another shape or with numbers that are not finite.
    """
    inputs = weight.shape[1]
    if gram.shape != (inputs, inputs):
        raise TautError(f"the Gram matrix is {tuple(gram.shape)}; a map of {inputs} inputs needs ({inputs}, {inputs})")
    if not gram.isfinite().all():
        raise TautError(
            "the Gram matrix holds numbers that are not finite: the model gave infinity or NaN on the calibration text"
        )
    gram = gram.to(weight.device)
    energy = gram.diagonal().double()
    if not energy.any():
        return weight.double()
    order = energy.argsort(descending=True, stable=True)
    factor = _inverse_factor(gram[order][:, order])
    numbers = weight.detach().double()[:, order]
    for start in range(0, inputs, COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, inputs)
        # Transposed, so that each column is contiguous in memory.
        block = numbers[:, start:stop].T.contiguous()
        errors = torch.empty_like(block)
        for place, index in enumerate(order[start:stop].tolist()):
            row = factor[start + place, start + place : stop]
            errors[place] = (block[place] - rounded(block[place], index)) / row[0]
            block[place + 1 :] -= row[1:, None] * errors[place]
        numbers[:, start:stop] = block.T
        numbers[:, stop:] -= errors.T @ factor[start:stop, stop:]
    return torch.empty_like(numbers).index_copy_(1, order, numbers)


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor U of the damped inverse, (G + d I)^-1 = U^T U, float64.

    Row j divided by its diagonal element tells how much to subtract from each later column for an error of one in
    column j, once the columns before j are rounded.
    """
    damped = gram.double()
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(len(damped), device=damped.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
