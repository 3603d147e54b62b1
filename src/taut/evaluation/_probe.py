"""Multinomial logistic regression on given features; its regularisation is chosen on the training rows alone."""

from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_softmax

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Candidates for C, the inverse of the penalty's weight (as in LIBLINEAR)."""
HELD_OUT = 5
"""One training row in this many is held out to choose C."""


def probe(train: Any, labels: np.ndarray, evaluation: Any, classes: int) -> tuple[np.ndarray, float]:
    """Train a probe and predict the evaluation rows: predictions (M,) and the C used.

    ``train`` (N, D) and ``evaluation`` (M, D) are dense or sparse features, ``labels`` (N,) integers. C is the
    candidate with the smallest cross-entropy on the held-out training rows; accuracy would be too coarse if one class
    is rare. The evaluation rows do not influence it. The final fit uses all training rows. Deterministic.
    """
    held_out = np.arange(len(labels)) % HELD_OUT == HELD_OUT - 1
    strength = STRENGTHS[0]
    if held_out.any():
        losses = {}
        for candidate in STRENGTHS:
            weights = fit(train[~held_out], labels[~held_out], classes, candidate)
            logs = log_softmax(train[held_out] @ weights[:-1] + weights[-1], axis=1)
            losses[candidate] = -float(np.take_along_axis(logs, labels[held_out][:, None], axis=1).sum())
        strength = min(losses, key=losses.__getitem__)
    return predict(evaluation, fit(train, labels, classes, strength)), strength


def fit(features: Any, labels: np.ndarray, classes: int, strength: float) -> np.ndarray:
    """(N, D) features, (N,) labels -> weights (D + 1, classes) float64; the last row is the bias.

    Minimises C times the summed cross-entropy plus half the sum of squared weights, by L-BFGS from zero. The bias is
    not penalised. ``strength`` is C.
    """
    rows, width = features.shape
    wanted = np.eye(classes)[labels]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(width + 1, classes)
        logs = log_softmax(features @ weights[:-1] + weights[-1], axis=1)
        excess = (np.exp(logs) - wanted) / rows
        penalty = weights[:-1] / (strength * rows)
        gradient = np.vstack([features.T @ excess + penalty, excess.sum(0, keepdims=True)])
        return float(-(logs * wanted).sum() / rows + (penalty * weights[:-1]).sum() / 2), gradient.ravel()

    start = np.zeros((width + 1) * classes)
    minimum = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 300})
    return minimum.x.reshape(width + 1, classes)


def predict(features: Any, weights: np.ndarray) -> np.ndarray:
    """(M, D) features -> (M,) most likely classes; the lower class if two are equally likely."""
    return np.argmax(features @ weights[:-1] + weights[-1], axis=1)
