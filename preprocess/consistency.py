"""Do the numbers of a file look like the units and the sign that the reader takes them for? Additive sums, no metadata.

Where isolated atoms are known, bound atoms lie a few eV below them. Where they are not, energies fitted to the
composition give H some -13.6 eV, and no total energy lies far below that of all electrons. The nearest two atoms of a
structure are about a bond apart. Along a short way from one conformation of a molecule to the next, the work of the
mean force is minus the change of energy.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from hpcmlip.data import offsets
from hpcmlip.data.store import Offsets
from hpcmlip.errors import DataError
from hpcmlip.preprocess.job import Job
from hpcmlip.preprocess.readers import Rows
from hpcmlip.units import HARTREE

log = logging.getLogger(__name__)

LARGEST_BINDING = 25.0
"""eV an atom, mean over a data set; atomization energies of molecules are 2 to 7 eV an atom."""
HYDROGEN = (-100.0, -2.0)
"""eV of a fitted H atom. Fits to DFT and coupled cluster gave -16 to -17, to GFN-xTB -14; few compositions make it
vague. eV or kcal/mol taken for Ha, kcal/mol taken for eV: below -370; Ha taken for eV: -0.6."""
MOST_OF_ALL_ELECTRONS = 2.0
"""Energies against the all-electron estimate: 1 where all electrons are computed, 0.07 where the valence shell is."""
BOND = (0.6, 1.5)
"""Nearest distance against the sum of covalent radii, mean over a data set; some 1.9 in bohr."""
FAR = 3.0
"""A nearest distance counts as so many bonds at most: a few dissociated molecules do not move the mean."""
SHORT_WAY = 0.3
"""Å, root mean square displacement of the atoms of two conformations that are compared."""
LEAP = 3.0
"""Å; no atom moves as far between two conformations that are compared."""
WORK = (0.6, 1.6)
"""-ΔE against F·ΔR; 0.53 or 1.89 where one length is in bohr, 0.037 or 27 where one energy is in Ha."""
SURE = 0.9
"""Correlation of the two from which their ratio says something."""
ENOUGH = 30
"""Pairs of conformations, or conformations, from which something is concluded."""


@dataclass(frozen=True)
class Sums:
    """Over rows; L levels, E elements. They add up over units."""

    binding: np.ndarray
    """[L, 2] number and sum of (E - isolated atoms) / N where these are known."""
    work: np.ndarray
    """[L, 4] number, Σab, Σa², Σb² of pairs with a = -ΔE and b = F·ΔR."""
    bonds: np.ndarray
    """[2] number and sum of nearest distances over covalent radii."""
    count: np.ndarray
    """[L]; with the next three the normal equations of composition against total energy (`store.Offsets`), of levels
    whose isolated atoms are not known."""
    ata: np.ndarray
    atb: np.ndarray
    btb: np.ndarray

    @staticmethod
    def zeros(num_levels: int, num_elements: int) -> "Sums":
        L, E = num_levels, num_elements
        shapes = [(L, 2), (L, 4), (2,), (L,), (L, E, E), (L, E), (L,)]
        return Sums(*(np.zeros(shape) for shape in shapes))

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def fit(self, level: int) -> Offsets:
        """Normal equations of a level."""
        ata, atb = self.ata[level].tolist(), self.atb[level].tolist()
        return Offsets(int(self.count[level]), tuple(map(tuple, ata)), tuple(atb), float(self.btb[level]))

    def as_json(self) -> dict:
        return {f.name: getattr(self, f.name).tolist() for f in fields(self)}

    @staticmethod
    def from_json(values: dict) -> "Sums":
        return Sums(**{name: np.array(part) for name, part in values.items()})


class Meter:
    """Adds up `sums` over the rows of a unit."""

    def __init__(self, job: Job):
        self._elements, self._force_levels = list(job.elements), job.force_levels
        levels = job.store_levels()
        known = [offsets.knows_isolated(level, self._elements) for level in levels]
        self._isolated = [
            offsets.isolated_energies(level, self._elements) if is_known else None
            for level, is_known in zip(levels, known, strict=True)
        ]
        self.sums = Sums.zeros(len(levels), len(self._elements))

    def add(self, rows: Rows, kept: np.ndarray, bonds: np.ndarray) -> None:
        """R rows, `kept` [R] bool of them, with `bonds` [R] as `checks.Verdict` has them."""
        if not kept.any():
            return
        sums, counts = self.sums, np.array([np.count_nonzero(rows.numbers == z) for z in self._elements])
        for i, isolated in enumerate(self._isolated):
            energy = rows.energy[kept, i]
            energy = energy[np.isfinite(energy)]
            if isolated is not None:
                sums.binding[i] += len(energy), (energy - counts @ isolated).sum() / len(rows.numbers)
            else:
                sums.count[i] += len(energy)
                sums.ata[i] += len(energy) * np.outer(counts, counts)
                sums.atb[i] += counts * energy.sum()
                sums.btb[i] += energy @ energy
        near = _neighbours(rows, kept)
        for plane, i in enumerate(self._force_levels):
            sums.work[i] += _work(rows, near, rows.energy[:, i], rows.forces[:, plane])
        told = bonds[kept & np.isfinite(bonds)]
        sums.bonds[:] += len(told), np.minimum(told, FAR).sum()


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


def check(job: Job, sums: Sums) -> None:
    """Warn of what looks odd; raises DataError for what looks wrong, unless the config lets that pass."""
    problems = list(_wrong(job, sums))
    if problems and job.config.check_units:
        raise DataError(
            f"{'; '.join(problems)}. Convert the file, or take a reader and levels that fit it; if all is as it "
            "should be, 'check_units: false' lets it pass"
        )
    for text in [*problems, *_odd(job, sums)]:
        log.warning("%s", text)


def _wrong(job: Job, sums: Sums) -> Iterator[str]:
    bonds, length = sums.bonds
    if bonds >= ENOUGH and not BOND[0] < length / bonds < BOND[1]:
        yield (
            f"the two nearest atoms of a structure are on average {length / bonds:.2f} bond lengths apart: probably "
            "the coordinates are in another unit than Å (bohr would give 1.9)"
        )
    for i, (level, (count, binding), work) in enumerate(zip(job.levels, sums.binding, sums.work, strict=True)):
        if count and abs(binding / count) > LARGEST_BINDING:
            yield (
                f"the energies of level '{level.name}' are on average {binding / count:.0f} eV an atom away from "
                "the isolated atoms: probably in another unit than the reader takes them for, or atomic_energies "
                "belongs to another level of theory"
            )
        elif sums.count[i] >= ENOUGH:
            yield from _wrong_energies(job, level.name, sums.fit(i))
        cosine, slope = _slope(work)
        if cosine > SURE and not WORK[0] < slope < WORK[1]:
            yield (
                f"-ΔE is {slope:.3g} times F·ΔR at level '{level.name}', over {work[0]:.0f} pairs of conformations: "
                "energies, forces and coordinates do not belong together (forces in Ha/bohr where Ha/Å is read would "
                "give 1.89, in kcal/mol/Å where eV/Å is read 0.0434)"
            )
        if cosine < -0.5:
            yield (
                f"the forces of level '{level.name}' point uphill (F·ΔR against -ΔE over {work[0]:.0f} pairs of "
                f"conformations: correlation {cosine:.2f}): probably gradients, take a reader that turns the sign"
            )


def _wrong_energies(job: Job, level: str, fit: Offsets) -> Iterator[str]:
    hydrogen, ratio = _fitted_hydrogen(job, fit), _of_all_electrons(job, fit)
    if hydrogen is not None and hydrogen < HYDROGEN[0]:
        found = f"give an H atom {hydrogen:.1f} eV by least squares on the composition, expected about -13.6 eV"
    elif ratio > MOST_OF_ALL_ELECTRONS:
        found = f"are {ratio:.1f} times what all electrons of these atoms have"
    else:
        return
    yield f"the energies of level '{level}' {found}: probably in another unit than the reader takes them for"


def _odd(job: Job, sums: Sums) -> Iterator[str]:
    for i, (level, work) in enumerate(zip(job.levels, sums.work, strict=True)):
        hydrogen = _fitted_hydrogen(job, sums.fit(i)) if sums.count[i] >= ENOUGH else None
        if hydrogen is not None and hydrogen > HYDROGEN[1]:
            yield (
                f"level '{level.name}': least squares on the composition give an H atom {hydrogen:.2f} eV, total "
                "energies about -13.6 eV; check the unit, unless the energies are relative to something"
            )
        cosine, slope = _slope(work)
        if cosine > SURE and not 0.7 < slope < 1.4 and WORK[0] < slope < WORK[1]:
            yield f"level '{level.name}': -ΔE is {slope:.2f} times F·ΔR; check the units of forces and coordinates"


def _slope(work: np.ndarray) -> tuple[float, float]:
    """(correlation, slope) of -ΔE against F·ΔR; (0, 1) where there are too few pairs."""
    pairs, ab, aa, bb = work.tolist()
    return (ab / (aa * bb) ** 0.5, ab / bb) if pairs >= ENOUGH and aa * bb else (0.0, 1.0)


def _fitted_hydrogen(job: Job, fit: Offsets) -> float | None:
    """eV; None where the compositions do not tell H from the other elements."""
    if 1 not in job.elements:
        return None
    h, ata = job.elements.index(1), np.asarray(fit.ata)
    known = np.linalg.pinv(ata, rcond=1e-10, hermitian=True) @ ata  # projection on what the compositions determine
    return float(offsets.atomic_energies(fit)[0][h]) if abs(known[h, h] - 1) < 1e-6 else None


def _of_all_electrons(job: Job, fit: Offsets) -> float:
    """Energies over -0.5 Z^2.4 Ha an atom (Thomas-Fermi with its exponent rounded up: C -36.9, Cl -449), by least
    squares."""
    electrons = -0.5 * HARTREE * np.array(job.elements, dtype=np.float64) ** 2.4
    return float(electrons @ np.array(fit.atb) / (electrons @ np.asarray(fit.ata) @ electrons))
