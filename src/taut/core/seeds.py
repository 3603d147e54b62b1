"""Seeds that do not meet: what a step or an epoch draws follows from the run's seed and its own number alone."""

EPOCHS_APART = 1_000_003
STEPS_APART = 1 << 16
"""More than a step draws of anything."""


def epoch_seed(seed: int, number: int) -> int:
    """The seed of the order, or of whatever else is drawn once in epoch (or for row) ``number``."""
    return seed * EPOCHS_APART + number


def step_seed(seed: int, step: int) -> int:
    """The first of a step's own draws."""
    return seed + step * STEPS_APART
