"""The cost of training, computed from sizes alone, without a model or torch.

The accounting is that of Wei et al. 2024 (arXiv 2406.16450). A multiply-add is two FLOPs. The backward pass costs twice
the forward pass. All score pairs of causal attention and the output head count; biases and norms do not.
"""

BACKWARD = 2
"""FLOPs of the backward pass over those of the forward pass: one product for the inputs, one for the weights."""
TRAINING = 1 + BACKWARD
USE = 0.5
"""The share of its phase in which a stochastic guide is computed: the mean of either schedule."""


def matched_share(dense: float, structured: float, guide: float, use: float = USE) -> float:
    """rho, the share of the steps to guide and later repeat unguided, so that the total cost is that of dense training.

    It is (F_dense - F_structured) / (F_structured + use F_guide), with the FLOPs of equally many tokens.
    """
    return (dense - structured) / (structured + use * guide)
