"""From the times of some pieces of work to the time of all, and from there to that of a run: pure functions."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from hpcmlip.config import TrainSection

PARTS = 5
"""Equal parts of a probe whose speeds are compared."""


@dataclass(frozen=True)
class Range:
    """A number with what it is at the least and at the most."""

    value: float
    low: float
    high: float

    def __add__(self, other: "Range") -> "Range":
        return Range(self.value + other.value, self.low + other.low, self.high + other.high)

    def __mul__(self, factor: float) -> "Range":
        return Range(factor * self.value, factor * self.low, factor * self.high)


class Cost:
    """Seconds of a piece of work, fitted as a + b · blocks + c · atoms + d · pairs with no negative coefficient.

    `work` [n, 3] and the `seconds` [n] that it took, in the order in which it was done.
    """

    def __init__(self, work: np.ndarray, seconds: np.ndarray):
        terms = _terms(work)
        # columns of one size: their numbers differ by orders of magnitude
        self._scale = np.maximum(terms.max(0), 1.0)
        self._coefficients, _ = nnls(terms / self._scale, seconds)
        # without a negative coefficient, the fit may miss the sum
        self._coefficients *= seconds.sum() / self(work).sum()
        expected = self(work)
        parts = np.array_split(np.arange(len(seconds)), min(PARTS, len(seconds)))
        ratios = [seconds[part].sum() / expected[part].sum() for part in parts]
        self._low, self._high = min(ratios), max(ratios)

    def __call__(self, work: np.ndarray) -> np.ndarray:
        """[n] seconds expected for [n, 3] work."""
        return _terms(work) / self._scale @ self._coefficients

    def range(self, seconds: float) -> Range:
        """What `seconds` are if all is as fast as in the fastest, or as slow as in the slowest part of the probe."""
        return Range(seconds, self._low * seconds, self._high * seconds)


def _terms(work: np.ndarray) -> np.ndarray:
    return np.column_stack([np.ones(len(work)), work])


def validation_seconds(cost: Cost, work: np.ndarray) -> float:
    """Of a validation with the work [batches, ranks, 3]: that of the rank with most; a batch without blocks is none."""
    batches, ranks, _ = work.shape
    seconds = cost(work.reshape(-1, 3)).reshape(batches, ranks)
    return float(np.where(work[..., 0] > 0, seconds, 0.0).sum(0).max())


def num_validations(train: TrainSection) -> int:
    """Of a run: every so many epochs, and after the last."""
    return -(-train.epochs // train.validate_every)


def run_seconds(
    train: TrainSection, *, start_up: float, steps: int, epoch: Range, validation: Range, save: float, export: float
) -> Range:
    """Of all epochs with validations and checkpoints.

    As expected and at the most each validation is the best so far, which costs a checkpoint and a model; at the least
    only the first is. `save` and `export` are the seconds of one of these, `steps` those of the run.
    """
    work = epoch * train.epochs + validation * num_validations(train)
    saves = 1 + steps // train.checkpoint_steps if train.checkpoint_steps else 1
    saves += min(steps, int(work.value / max(60 * train.checkpoint_minutes, work.value / steps)))
    always = start_up + save * saves + (save + export)
    best = (num_validations(train) - 1) * (save + export)
    return work + Range(always + best, always, always + best)
