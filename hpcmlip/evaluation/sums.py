"""What an evaluation counts: additive over blocks and ranks, so that one reduction gives the figures of all data.

Axes: predictors Q (the members, then their mean, then the baseline), sizes G (atom counts of the store), levels L,
properties 2 (energy in eV a molecule, force components in eV/Å), and per entry (count, Σ|e|, Σe²).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SPREAD_EDGES = np.concatenate([[0.0], np.logspace(-8, 4, 1153), [np.inf]])
"""Bins of the spread (eV or eV/Å), 96 a decade: fine enough to be joined into quantiles after the reduction."""
SPREAD_COLUMNS = ("count", "spread", "error", "spread2", "error2", "product", "within1", "within2")
"""Sums over a bin: 1, σ, |e|, σ², e², σ|e|, [|e| <= σ], [|e| <= 2σ]."""


@dataclass(frozen=True)
class Result:
    """B structures of N atoms: labels and what was predicted, in eV and eV/Å, float64; NaN: no label."""

    numbers: np.ndarray
    """[B, N] atomic numbers."""
    source: np.ndarray
    """[B, 3] file, group, row of the store."""
    energy_label: np.ndarray
    """[B, L] totals."""
    energy: np.ndarray
    """[P, B, L] totals."""
    baseline: np.ndarray
    """[B, L] totals of the composition alone."""
    forces_label: np.ndarray
    """[B, N, Lf, 3]."""
    forces: np.ndarray
    """[P, B, N, Lf, 3]."""


@dataclass(frozen=True)
class Sums:
    """Additive figures of one evaluation."""

    errors: np.ndarray
    """[Q, G, L, 2, 3]."""
    spread: np.ndarray
    """[L, 2, bins, 8]: by the members' standard deviation, errors of their mean (`SPREAD_COLUMNS`)."""

    @staticmethod
    def zeros(num_members: int, num_sizes: int, num_levels: int) -> "Sums":
        return Sums(
            np.zeros((num_members + 2, num_sizes, num_levels, 2, 3)),
            np.zeros((num_levels, 2, len(SPREAD_EDGES) - 1, len(SPREAD_COLUMNS))),
        )

    def flat(self) -> np.ndarray:
        """All sums as one vector, for one reduction."""
        return np.concatenate([self.errors.ravel(), self.spread.ravel()])

    def from_flat(self, values: np.ndarray) -> "Sums":
        """Sums of the shapes of this one out of such a vector."""
        cut = self.errors.size
        return Sums(values[:cut].reshape(self.errors.shape), values[cut:].reshape(self.spread.shape))


def result_sums(result: Result, force_levels: Sequence[int], size: int, zero: Sums) -> Sums:
    """Sums of one block whose atom count is number `size`; `force_levels` are the levels of the force planes."""
    energies = np.concatenate([result.energy, result.energy.mean(0)[None], result.baseline[None]])
    # the composition alone says nothing of forces: its forces are zero
    forces = np.concatenate([result.forces, result.forces.mean(0)[None], np.zeros((1, *result.forces.shape[1:]))])
    errors, spread = np.zeros_like(zero.errors), np.zeros_like(zero.spread)
    errors[:, size, :, 0] = _sums(energies - result.energy_label)
    errors[:, size, list(force_levels), 1] = _sums(_by_level(forces - result.forces_label))
    if len(result.energy) > 1:
        mean_error = (energies[-2] - result.energy_label).T
        for level, (sigma, e) in enumerate(zip(std(result.energy).T, mean_error, strict=True)):
            spread[level, 0] = _spread_sums(sigma, e)
        sigmas, mean_error = _by_level(std(result.forces)), _by_level(forces[-2] - result.forces_label)
        for plane, level in enumerate(force_levels):
            spread[level, 1] = _spread_sums(sigmas[:, plane], mean_error[:, plane])
    return Sums(errors, spread)


def std(members: np.ndarray) -> np.ndarray:
    """[P, ...] -> [...]: sample standard deviation over members; NaN for one member."""
    return members.std(axis=0, ddof=1) if len(members) > 1 else np.full(members.shape[1:], np.nan)


def _by_level(forces: np.ndarray) -> np.ndarray:
    """[..., B, N, Lf, 3] -> [..., B·N·3, Lf]."""
    planes = np.moveaxis(forces, -2, -1)
    # the product in full: -1 has no meaning where no level has forces
    return planes.reshape(*planes.shape[:-4], planes.shape[-4] * planes.shape[-3] * planes.shape[-2], planes.shape[-1])


def _sums(error: np.ndarray) -> np.ndarray:
    """[Q, n, C] with NaN where there is no label -> [Q, C, 3]."""
    known = ~np.isnan(error)
    e = np.where(known, error, 0.0)
    return np.stack([known.sum(1), np.abs(e).sum(1), (e * e).sum(1)], axis=-1)


def _spread_sums(sigma: np.ndarray, error: np.ndarray) -> np.ndarray:
    """[n], [n] -> [bins, 8]."""
    known = ~np.isnan(error)
    s, e = sigma[known], np.abs(error[known])
    which = np.digitize(s, SPREAD_EDGES) - 1
    columns = (np.ones_like(s), s, e, s * s, e * e, s * e, e <= s, e <= 2 * s)
    bins = len(SPREAD_EDGES) - 1
    return np.stack([np.bincount(which, weights=column, minlength=bins) for column in columns], axis=1)
