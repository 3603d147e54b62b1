"""Seeds that do not overlap. They depend only on the run's seed and the number of the step or epoch."""

EPOCHS_APART = 1_000_003
STEPS_APART = 1 << 16
"""The distance of the seeds of two training steps: more than the random steps that a part makes in one of them."""


def epoch_seed(seed: int, number: int) -> int:
    """The seed of what is random once per epoch, such as the order of rows, or once per row."""
    return seed * EPOCHS_APART + number


def step_seed(seed: int, step: int) -> int:
    """The number of the first random step in training step ``step``."""
    return seed + step * STEPS_APART
