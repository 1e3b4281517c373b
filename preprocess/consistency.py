"""Do the numbers of a file look like the units and the sign that the reader takes them for? Sums per level, additive.

Two observations that need no metadata: bound atoms lie a few eV below isolated ones, and along a short way from one
conformation of a molecule to the next the work of the mean force is minus the change of energy.
"""

import logging

import numpy as np

from hpcmlip.data import offsets
from hpcmlip.errors import DataError
from hpcmlip.preprocess.job import Job
from hpcmlip.preprocess.readers import Rows

log = logging.getLogger(__name__)

LARGEST_BINDING = 25.0
"""eV an atom, mean over a data set; atomization energies of molecules are 2 to 7 eV an atom."""
SHORT_WAY = 0.3
"""Å, root mean square displacement of the atoms of two conformations that are compared."""
LEAP = 3.0
"""Å; no atom moves as far between two conformations that are compared."""
ENOUGH_PAIRS = 30
COLUMNS = 6
"""Number and sum of (E - isolated atoms) / N; number, Σab, Σa², Σb² of pairs with a = -ΔE and b = F·ΔR."""


def nothing(num_levels: int) -> np.ndarray:
    return np.zeros((num_levels, COLUMNS))


def add(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return one + other


def measure(job: Job, rows: Rows, kept: np.ndarray) -> np.ndarray:
    """[L, 6] of R rows, `kept` [R] bool of them."""
    sums = nothing(len(job.levels))
    known = list(job.elements)
    if not kept.any():
        return sums
    counts = np.array([np.count_nonzero(rows.numbers == z) for z in known])
    for i, level in enumerate(job.store_levels()):
        energy = rows.energy[:, i]
        labelled = kept & np.isfinite(energy)
        if offsets.knows_isolated(level, known) and labelled.any():
            binding = (energy[labelled] - counts @ offsets.isolated_energies(level, known)) / len(rows.numbers)
            sums[i, :2] = len(binding), binding.sum()
    near = _neighbours(rows, kept)
    for plane, i in enumerate(job.force_levels):
        sums[i, 2:] = _work(rows, near, rows.energy[:, i], rows.forces[:, plane])
    return sums


def _neighbours(rows: Rows, kept: np.ndarray) -> np.ndarray:
    """Rows r such that r and r + 1 are near conformations of one molecule."""
    both = np.flatnonzero(kept[1:] & kept[:-1] & (rows.molecule[1:] == rows.molecule[:-1]))
    if rows.pbc is not None:
        same = (rows.cell[1:] == rows.cell[:-1]).all(axis=(1, 2)) & (rows.pbc[1:] == rows.pbc[:-1]).all(axis=1)
        both = both[same[both]]
    step = rows.pos[both + 1] - rows.pos[both]
    near = np.sqrt((step * step).sum(axis=(1, 2)) / step.shape[1]) < SHORT_WAY
    # of a large cell, an atom that was put back into it from the other side moves the mean little
    return both[near & (np.abs(step).max(axis=(1, 2)) < LEAP)]


def _work(rows: Rows, near: np.ndarray, energy: np.ndarray, forces: np.ndarray) -> tuple[float, ...]:
    step = rows.pos[near + 1] - rows.pos[near]
    with np.errstate(invalid="ignore"):
        b = 0.5 * ((forces[near] + forces[near + 1]) * step).sum(axis=(1, 2), dtype=np.float64)
        a = energy[near] - energy[near + 1]
    finite = np.isfinite(a) & np.isfinite(b)
    a, b = a[finite], b[finite]
    return len(a), a @ b, a @ a, b @ b


def check(job: Job, sums: np.ndarray) -> None:
    """Raises DataError for gradients and for energies in another unit; warns about forces in another unit."""
    for level, (count, binding, pairs, ab, aa, bb) in zip(job.levels, sums.tolist(), strict=True):
        if count and abs(binding / count) > LARGEST_BINDING:
            raise DataError(
                f"the energies of level '{level.name}' are on average {binding / count:.0f} eV an atom away from "
                "the isolated atoms: probably in another unit than the reader takes them for, or atomic_energies "
                "belongs to another level of theory"
            )
        if pairs < ENOUGH_PAIRS or not aa * bb:
            continue
        cosine, slope = ab / (aa * bb) ** 0.5, ab / bb
        if cosine < -0.5:
            raise DataError(
                f"the forces of level '{level.name}' point uphill (F·ΔR against -ΔE over {pairs:.0f} pairs of "
                f"conformations: correlation {cosine:.2f}): probably gradients, take a reader that turns the sign"
            )
        if cosine > 0.9 and not 0.7 < slope < 1.4:
            log.warning("level '%s': -ΔE is %.2f times F·ΔR; check the units of the forces", level.name, slope)
