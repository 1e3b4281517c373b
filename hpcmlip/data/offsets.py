"""Atomic energies by least squares: min over ε of Σ (E - Σ_s n_s ε_s)² on the training split, in float64 (spec §10.2).

Sharding accumulates the normal equations, which add over chunks, workers and stores; `atomic_energies` solves them.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from hpcmlip.data.store import Level, Offsets
from hpcmlip.units import ATOMIC_NUMBERS


def accumulate(counts: np.ndarray, energy: np.ndarray) -> Offsets:
    """Normal equations of element counts [R, E] and energies [R] eV; rows without label (NaN) do not enter."""
    rows = np.isfinite(energy)
    n, e = counts[rows].astype(np.float64), energy[rows].astype(np.float64)
    return Offsets(int(rows.sum()), tuple(map(tuple, (n.T @ n).tolist())), tuple((n.T @ e).tolist()), float(e @ e))


def add(parts: Iterable[Offsets], num_elements: int) -> Offsets:
    """Sum of normal equations."""
    count, ata, atb, btb = 0, np.zeros((num_elements, num_elements)), np.zeros(num_elements), 0.0
    for part in parts:
        count, ata, atb, btb = count + part.count, ata + part.ata, atb + part.atb, btb + part.btb
    return Offsets(count, tuple(map(tuple, ata.tolist())), tuple(atb.tolist()), btb)


def atomic_energies(offsets: Offsets) -> tuple[np.ndarray, float]:
    """([E] eV, RMS residual eV): the least-squares solution of least norm (0 for an element that never occurs)."""
    if offsets.count == 0:
        return np.zeros(len(offsets.atb)), float("nan")
    ata, atb = np.asarray(offsets.ata), np.asarray(offsets.atb)
    solution = np.linalg.pinv(ata, rcond=1e-10, hermitian=True) @ atb
    square = offsets.btb - 2 * solution @ atb + solution @ ata @ solution
    return solution, float(np.sqrt(max(square, 0.0) / offsets.count))


def isolated_energies(level: Level, elements: Sequence[int]) -> np.ndarray:
    """[E] eV of the isolated atoms of a level; zeros if the level does not know them for every element."""
    if not knows_isolated(level, elements):
        return np.zeros(len(elements))
    by_number = {ATOMIC_NUMBERS[symbol]: value for symbol, value in level.atomic_energies.items()}
    return np.array([by_number[z] for z in elements], dtype=np.float64)


def knows_isolated(level: Level, elements: Sequence[int]) -> bool:
    """Does the level carry isolated-atom energies for all these elements?"""
    known = {ATOMIC_NUMBERS[symbol] for symbol in level.atomic_energies or ()}
    return known.issuperset(elements)


def shift(offsets: Offsets, energies: np.ndarray) -> Offsets:
    """The same equations after subtraction of atomic energies [E] eV from every label."""
    ata, atb = np.asarray(offsets.ata), np.asarray(offsets.atb)
    moved = offsets.btb - 2 * energies @ atb + energies @ ata @ energies
    return Offsets(offsets.count, offsets.ata, tuple((atb - ata @ energies).tolist()), float(moved))


def spread(offsets: Offsets, columns: Sequence[int], num_elements: int) -> Offsets:
    """The same equations with element e in column `columns[e]` of `num_elements`."""
    ata, atb = np.zeros((num_elements, num_elements)), np.zeros(num_elements)
    ata[np.ix_(columns, columns)] = offsets.ata
    atb[list(columns)] = offsets.atb
    return Offsets(offsets.count, tuple(map(tuple, ata.tolist())), tuple(atb.tolist()), offsets.btb)
