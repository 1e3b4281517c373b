"""Structures for tests: real molecules from the packaged sample, ideal geometries, and batches of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from hpcmlip import configs
from hpcmlip.batch import AtomsBatch, DataSpec
from hpcmlip.graph import DenseTopology
from hpcmlip.neighbours import neighbour_lists

ELEMENTS = (1, 6, 7, 8)

Molecule = tuple[np.ndarray, np.ndarray]
"""Atomic numbers [N] and positions [N, 3] Å."""


def spec(levels: Sequence[str] = ("low", "high"), force_levels: Sequence[int] | None = None) -> DataSpec:
    """Levels of theory for H, C, N, O with a small constant part per element."""
    L = len(levels)
    return DataSpec(
        elements=ELEMENTS,
        levels=tuple(levels),
        force_levels=tuple(range(L) if force_levels is None else force_levels),
        reference=np.zeros((L, 4)),
        residual=0.1 * np.random.default_rng(5).normal(size=(L, 4)),
        isolated=(True,) * L,
    )


def real(formula: str, rows: slice | Sequence[int] = slice(0, 1), path: Path | None = None) -> list[Molecule]:
    """Conformations of a formula (`C2H6O1`: counts written out) of the packaged ab-initio sample."""
    with h5py.File(path or configs.path("samples/ab_initio_small.h5")) as file:
        group = file[formula]
        numbers = group["atomic_numbers"][:].astype(np.int64)
        return [(numbers, pos) for pos in group["coordinates"][rows].astype(np.float64)]


def batch(
    molecules: Sequence[Molecule],
    dtype: torch.dtype = torch.float64,
    *,
    reach: float | None = None,
    cell: np.ndarray | None = None,
) -> AtomsBatch:
    """One block of molecules of one size, without labels.

    With `reach` (Å) in the form of neighbour lists; with `cell` [3, 3] Å each repeats along all three vectors.
    """
    numbers = np.concatenate([numbers for numbers, _ in molecules])
    pos = np.concatenate([pos for _, pos in molecules])
    B, N = len(molecules), len(molecules[0][0])
    topology = DenseTopology(B, N)
    if reach is not None:
        lattice = {} if cell is None else {"cell": np.stack([cell] * B), "pbc": np.ones((B, 3), dtype=bool)}
        topology = neighbour_lists(pos.reshape(B, N, 3), reach, **lattice).to(dtype=dtype)
    return AtomsBatch(
        species=torch.tensor([ELEMENTS.index(z) for z in numbers]),
        pos=torch.tensor(pos, dtype=dtype).reshape(-1, 3),
        topology=topology,
        energy=None,
        forces=None,
        weight=torch.ones(B, dtype=dtype),
        source=np.zeros((B, 4), dtype=np.int64),
    )


def labelled(block: AtomsBatch, force_labels: Sequence[int]) -> AtomsBatch:
    """With labels 0 as the loader gives them, of two levels with forces: energies, and forces of the levels given."""
    forces = torch.full((len(block.pos), 2, 3), torch.nan, dtype=block.pos.dtype)
    forces[:, list(force_labels)] = 0.0
    energy = torch.zeros(block.num_structures, 2, dtype=block.pos.dtype)
    return dataclasses.replace(block, energy=energy, forces=forces, force_labels=tuple(force_labels))


CELL = np.array([[3.6, 0.0, 0.0], [0.4, 3.3, 0.0], [-0.3, 0.5, 3.9]])
"""Å; holds a water molecule; most cutoffs reach beyond the next image."""


def crystal(repeats: Sequence[int] = (1, 1, 1)) -> tuple[Molecule, np.ndarray]:
    """Water molecules on a lattice: atoms of a supercell of `repeats` cells along each vector, and its cell."""
    numbers, pos = real("H2O1")[0]
    steps = np.array(list(np.ndindex(*repeats)))
    copies = [pos + step @ CELL for step in steps]
    return (np.tile(numbers, len(steps)), np.concatenate(copies)), CELL * np.array(repeats)[:, None]


def ideal() -> dict[str, Molecule]:
    """Geometries on which zero vectors, zero tensors, axes or missing neighbours have made models fail."""
    o2 = np.array([[0.0, 0, 0], [1.2, 0, 0]])
    t = 1.09 / np.sqrt(3)
    ring = np.array([[np.cos(a), np.sin(a), 0] for a in np.arange(6) * np.pi / 3])
    along = {f"bond_along_{axis}": ([1, 8], np.array([[0.0] * 3, np.eye(3)[i]])) for i, axis in enumerate("xyz")}
    return {
        "single_atom": ([6], np.zeros((1, 3))),
        "diatomic": ([8, 8], o2),
        "beyond_cutoff": ([1, 8], np.array([[0.0, 0, 0], [30.0, 0, 0]])),
        "one_atom_without_neighbours": ([8, 8, 1], np.vstack([o2, [[0, 40.0, 0]]])),
        "collinear_centrosymmetric": ([6, 8, 8], np.array([[0.0, 0, 0], [0, 0, 1.16], [0, 0, -1.16]])),
        "planar": ([6, 8, 1, 1], np.array([[0.0, 0, 0], [1.2, 0, 0], [-0.6, 0.94, 0], [-0.6, -0.94, 0]])),
        "benzene": ([6] * 6 + [1] * 6, np.vstack([1.39 * ring, 2.48 * ring])),
        "tetrahedral": (
            [6, 1, 1, 1, 1],
            t * np.array([[0, 0, 0], [1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]),
        ),
        "very_close": ([1, 1], np.array([[0.0, 0, 0], [0.3, 0, 0]])),
        **along,
    }


def rotation(seed: int, *, improper: bool = False) -> Tensor:
    """[3, 3] random orthogonal matrix of determinant 1, or -1."""
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    q[:, 0] *= np.sign(np.linalg.det(q)) * (-1 if improper else 1)
    return torch.tensor(q)
