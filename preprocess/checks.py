"""Which conformations are bad, and why; which labels a good one carries. Pure."""

from dataclasses import dataclass

import numpy as np
from ase.data import covalent_radii

from hpcmlip import lattice
from hpcmlip.data.adjacency import squared_distances
from hpcmlip.data.store import energy_bit, forces_bit
from hpcmlip.lattice import LARGEST_DENSE
from hpcmlip.preprocess.job import Job
from hpcmlip.preprocess.readers import Rows
from hpcmlip.units import SYMBOLS

SHORT = 1.0
"""Å; nearest atoms are looked for within this or `min_distance`."""


@dataclass(frozen=True)
class Verdict:
    """Of R rows."""

    labels: np.ndarray
    """[R] uint64 label masks."""
    bad: dict[int, tuple[str, str]]
    """Row -> (reason, value)."""
    bonds: np.ndarray
    """[R] distance of the two nearest atoms over the sum of their covalent radii; NaN where that is not known."""


def judge(rows: Rows, job: Job) -> Verdict:
    """Labels of each row, and the rows that must not enter the store."""
    bad: dict[int, tuple[str, str]] = {}
    R = len(rows.pos)

    def mark(where: np.ndarray, reason: str, value) -> None:
        for row in np.flatnonzero(where):
            bad.setdefault(int(row), (reason, str(value(row)) if callable(value) else str(value)))

    unknown = sorted({int(z) for z in rows.numbers} - set(job.elements))
    if unknown:
        names = " ".join(SYMBOLS[z] if 0 < z < len(SYMBOLS) else str(z) for z in unknown)
        mark(np.ones(R, dtype=bool), "unknown element", names)
    finite = np.isfinite(rows.pos).all(axis=(1, 2))
    mark(~finite, "position not finite", lambda row: _first_bad(rows.pos[row]))
    pos = np.where(finite[:, None, None], rows.pos, 0)
    bonds = np.full(R, np.nan)
    if rows.pbc is not None and rows.pbc.any():
        flat = lattice.lacks_volume(rows.cell, rows.pbc)
        mark(flat, "cell without volume", lambda row: rows.cell[row].tolist())
        # a distance beyond the limit need not be known
        periodic = np.where(flat[:, None], False, rows.pbc)
        nearest = lattice.nearest_distances(pos, rows.cell, periodic, max(job.config.min_distance, SHORT))
    else:
        nearest, i, j = nearest_pairs(pos)
        radii = covalent_radii[np.where((rows.numbers > 0) & (rows.numbers < len(covalent_radii)), rows.numbers, 0)]
        bonds[finite] = (nearest / (radii[i] + radii[j]))[finite]
    mark(finite & (nearest < job.config.min_distance), "atoms too close", lambda row: f"{nearest[row]:.4f}")
    labels = np.zeros(R, dtype=np.uint64)
    for i, level in enumerate(job.levels):
        energy = rows.energy[:, i]
        mark(np.isinf(energy), f"{level.name} energy infinite", lambda row, e=energy: e[row])
        labels[np.isfinite(energy)] |= np.uint64(energy_bit(i))
    for plane, i in enumerate(job.force_levels):
        forces, name = rows.forces[:, plane].reshape(R, -1), job.levels[i].name
        infinite = np.isinf(forces).any(axis=1)
        mark(infinite, f"{name} forces infinite", lambda row, f=forces: _first_bad(f[row].reshape(-1, 3)))
        missing = np.isnan(forces).sum(axis=1)
        partly = (missing > 0) & (missing < forces.shape[1])
        mark(
            partly, f"{name} forces partly NaN", lambda row, m=missing, n=forces.shape[1]: f"{m[row]} of {n} components"
        )
        labels[missing == 0] |= np.uint64(forces_bit(i))
    return Verdict(labels, bad, bonds)


def _first_bad(values: np.ndarray) -> str:
    """Of [N, 3]: where the first component that is not finite stands."""
    atom, axis = np.argwhere(~np.isfinite(values))[0]
    return f"{values[atom, axis]} in {'xyz'[axis]} of atom {atom}"


def nearest_pairs(pos: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[R, N, 3] finite Å -> [R] distance of the two nearest atoms, [R] and [R] who they are; inf for a single atom."""
    R, N = pos.shape[:2]
    if N == 1:
        return np.full(R, np.inf), np.zeros(R, dtype=int), np.zeros(R, dtype=int)
    if N > LARGEST_DENSE:
        from scipy.spatial import cKDTree  # a tenth of a second that few data sets need

        found = [cKDTree(x).query(x, k=2) for x in pos]
        i = np.array([distances[:, 1].argmin() for distances, _ in found])
        row = zip(found, i, strict=True)
        distance, j = zip(*((distances[k, 1], others[k, 1]) for (distances, others), k in row), strict=True)
        return np.array(distance), i, np.array(j)
    square = squared_distances(pos)
    square[:, np.arange(N), np.arange(N)] = np.inf
    square = square.reshape(R, N * N)
    nearest = square.argmin(axis=1)
    return np.sqrt(square[np.arange(R), nearest]), *np.divmod(nearest, N)
