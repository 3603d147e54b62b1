"""Error-compensated rounding of a linear map: what rounding an input's column spoils, the columns to come repair.

Source: Frantar et al. 2022, GPTQ (arXiv 2210.17323), an exact and fast form of Optimal Brain Quantization. Columns go
by falling energy of their input (the authors' ``act-order``), and all scales are chosen before the first is rounded.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from taut.core.errors import TautError

DAMPING = 0.01
"""Share of the mean input energy given to every input, as the authors have it: it keeps the inverse of the Gram matrix
from following what little text has shown."""
COLUMNS_AT_ONCE = 64
"""After so many columns the repair of all others is one matrix product."""


def compensate(weight: Tensor, gram: Tensor, rounded: Callable[[Tensor, int], Tensor]) -> Tensor:
    """(M, N) float and the mean of x x^T over its inputs, (N, N) -> (M, N) float64: the numbers that, rounded to
    nearest, give the compensated map.

    ``rounded`` says what becomes of a column: (M,) float64 and its index -> (M,), by the same rule that the caller
    will round the result by. A singular ``gram`` is no obstacle; one of zeros leaves the weight as it is.
    Deterministic. Raises TautError for a Gram matrix of another shape or with numbers that are not finite.
    """
    inputs = weight.shape[1]
    if gram.shape != (inputs, inputs):
        raise TautError(f"the Gram matrix is {tuple(gram.shape)}; a map of {inputs} inputs needs ({inputs}, {inputs})")
    if not gram.isfinite().all():
        raise TautError("the Gram matrix holds numbers that are not finite: the calibration text broke the model")
    gram = gram.to(weight.device)
    energy = gram.diagonal().double()
    if not energy.any():
        return weight.double()
    order = energy.argsort(descending=True, stable=True)
    factor = _inverse_factor(gram[order][:, order])
    numbers = weight.detach().double()[:, order]
    for start in range(0, inputs, COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, inputs)
        # Transposed, so that a column lies side by side in memory.
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
    """The upper Cholesky factor U of the damped inverse, (G + d I)^-1 = U^T U, float64. Row j over its diagonal is what
    the columns after j repair for an error of one in column j, with the columns before it done."""
    damped = gram.double()
    damped = damped + DAMPING * damped.diagonal().mean() * torch.eye(len(damped), device=damped.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
