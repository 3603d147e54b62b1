"""What training costs, from sizes alone: no model, no torch.

The accounting of Wei et al. 2024 (arXiv 2406.16450): a multiply-add is two FLOPs, the backward pass twice the forward
one, all score pairs of causal attention count, the output head counts, biases and norms do not.
"""

BACKWARD = 2
"""FLOPs of the backward pass over those of the forward pass: one product for the inputs, one for the weights."""
TRAINING = 1 + BACKWARD
USE = 0.5
"""How often a stochastic guide is computed over its phase: the mean of either schedule."""


def matched_share(dense: float, structured: float, guide: float, use: float = USE) -> float:
    """rho, the share of the steps to guide and then to repeat unguided so that all costs what dense training would:
    (F_dense - F_structured) / (F_structured + use F_guide), of the FLOPs of equally many tokens."""
    return (dense - structured) / (structured + use * guide)
