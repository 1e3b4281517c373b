"""Periodic structures for tests: real molecules of the packaged sample in cells, with labels of a pair potential."""

from collections.abc import Sequence

import molecules
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.neighborlist import neighbor_list

FORMULAS = ("C1H4", "H3N1", "C1H4O1")
REACH = 4.0
"""Å; more than half of most cells."""


def boxes(
    number: int, seed: int = 0, formulas: Sequence[str] = FORMULAS, *, pbc: bool | tuple[bool, bool, bool] = True
) -> list[Atoms]:
    """Skewed cells of 3 to 7 Å, one molecule in each, without labels."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(number):
        ((numbers, pos),) = molecules.real(formulas[i % len(formulas)], slice(i % 40, i % 40 + 1))
        edges = np.ptp(pos, axis=0) + rng.uniform(2.5, 4.0, 3)
        cell = np.diag(edges) + np.triu(rng.uniform(-0.8, 0.8, (3, 3)), 1)
        found.append(Atoms(numbers, pos + rng.uniform(-5, 5, 3), cell=cell, pbc=pbc))
    return found


def pair_energy(dist):
    """v(r) = (1 - r / REACH)³ eV within the reach; a sum over pairs of atoms and images, each once, is the label."""
    return (1 - dist / REACH) ** 3


def labelled(structures: Sequence[Atoms]) -> list[Atoms]:
    """Copies with the energies (eV) and forces (eV/Å) of the pair potential, neighbours found by ASE."""
    found = []
    for atoms in structures:
        i, vec, dist = neighbor_list("iDd", atoms, REACH)
        slope = -3 / REACH * (1 - dist / REACH) ** 2
        forces = np.zeros((len(atoms), 3))
        np.add.at(forces, i, (slope / dist)[:, None] * vec)
        copy = atoms.copy()
        copy.calc = SinglePointCalculator(copy, energy=pair_energy(dist).sum() / 2, forces=forces)
        found.append(copy)
    return found
