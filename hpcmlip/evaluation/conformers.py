"""Conformer energy differences ΔE: what decides populations and barriers, free of the error of the composition.

For each molecule, the structures within 100 kcal/mol of its lowest reference energy; all pairs c < d of them; the error
of a pair is (Ê_c - Ê_d) - (E_c - E_d); pairs of all molecules are pooled (spec §9.3, COMP6). A molecule is what the
store takes for one: its SMILES where the raw file has it, else its formula (isomers are then paired too).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hpcmlip.data.store import Store
from hpcmlip.evaluation import predictions
from hpcmlip.evaluation.figures import BASELINE, ENSEMBLE, estimates
from hpcmlip.units import KCAL_PER_MOL

WINDOW = 100 * KCAL_PER_MOL
"""eV above the lowest conformer."""


def pair_sums(errors: np.ndarray) -> np.ndarray:
    """[n, Q] -> [Q, 3]: number of pairs, Σ|e_c - e_d| and Σ(e_c - e_d)² over all pairs, in O(n log n).

    With ascending e_(k): Σ_{c<d} |e_c - e_d| = Σ_k (2k - n - 1) e_(k); Σ_{c<d} (e_c - e_d)² = n Σe² - (Σe)².
    """
    n = len(errors)
    e = np.sort(errors - errors.mean(axis=0), axis=0)  # centered: the second sum is then n Σe²
    rank = 2 * np.arange(1, n + 1) - n - 1
    return np.stack([np.full(errors.shape[1], n * (n - 1) / 2), rank @ e, n * (e * e).sum(axis=0)], axis=1)


def sums(path: Path, store: Store, split: str, num_levels: int) -> np.ndarray:
    """[Q, L, 3] pair sums of a predictions.zarr of a split of `store`: members, their mean, baseline."""
    total = None
    for size, group in predictions.groups(path):
        molecule = _molecules(store, split, size, group["source"][:])
        label = group["energy_label"][:]
        members = group["energy_members"][:].swapaxes(0, 1)
        said = np.concatenate([members, members.mean(0)[None], group["energy_baseline"][:][None]])
        parts = [_level_sums(molecule, label[:, i], said[:, :, i]) for i in range(num_levels)]
        total = np.stack(parts, axis=1) + (0 if total is None else total)
    return total


def _level_sums(molecule: np.ndarray, label: np.ndarray, said: np.ndarray) -> np.ndarray:
    """[Q, 3] for one level: molecule keys [R], labels [R], predictions [Q, R] in eV."""
    total = np.zeros((len(said), 3))
    rows = np.flatnonzero(np.isfinite(label))
    rows = rows[np.argsort(molecule[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(molecule[rows], prepend=-1))
    for conformers in np.split(rows, starts[1:]):
        low = conformers[label[conformers] <= label[conformers].min(initial=np.inf) + WINDOW]
        if len(low) > 1:
            total += pair_sums((said[:, low] - label[low]).T)
    return total


def _molecules(store: Store, split: str, size: int, source: np.ndarray) -> np.ndarray:
    """[R] int64: key of the molecule of each source [R, 3]."""
    (meta,) = [group for group in store.meta.groups if group.num_atoms == size]
    spans = [(s.start, s.stop) for s in meta.segments if s.split == split]
    held, keys = (np.concatenate([store.read(meta, name, *span) for span in spans]) for name in ("source", "molecule"))
    _, place = np.unique(np.concatenate([held, source]), axis=0, return_inverse=True)
    key_at = np.zeros(place.max() + 1, dtype=np.int64)
    key_at[place[: len(held)]] = keys
    return key_at[place[len(held) :]]


def figures(total: np.ndarray, levels: Sequence[str], unit: str) -> dict:
    """{level: {"mae", "rmse", "ci95_*", "ensemble_mae", ..., "baseline_rmse", "unit", "count"}} of sums [Q, L, 3]."""
    found = {}
    for i, level in enumerate(levels):
        if total[0, i, 0] > 0:
            own = {
                f"{name}_{key}": value
                for name, q in (("ensemble", ENSEMBLE), ("baseline", BASELINE))
                for key, value in estimates(total[[q], i], unit).items()
                if not key.startswith("ci95")
            }
            found[level] = estimates(total[:ENSEMBLE, i], unit) | own | {"unit": unit, "count": int(total[0, i, 0])}
    return found
