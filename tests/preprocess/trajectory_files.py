"""Writers of trajectories and boxes: real molecules of the packaged sample, in the layouts of spec 9.4 and 9.5."""

import json
from collections.abc import Sequence
from pathlib import Path

import ase.io
import boxes
import h5py
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from hpcmlip import configs
from hpcmlip.preprocess.readers.ionic_liquid import ANION, CATION
from hpcmlip.units import HARTREE, KCAL_PER_MOL


def sample(formula: str, rows: int | None = None) -> dict[str, np.ndarray]:
    """numbers [N], pos [R, N, 3] Å, energy [R] eV, forces [R, N, 3] eV/Å of a formula (`C2H6O1`), wB97X/6-31G(d)."""
    with h5py.File(configs.path("samples/ab_initio_small.h5")) as file:
        group, part = file[formula], slice(rows)
        return {
            "numbers": group["atomic_numbers"][:].astype(np.int64),
            "pos": group["coordinates"][part],
            "energy": group["wb97x_dz.energy"][part] * HARTREE,
            "forces": group["wb97x_dz.forces"][part].astype(np.float64) * HARTREE,
        }


def md17(formula: str = "C2H6O1", rows: int | None = None) -> dict[str, np.ndarray]:
    """The arrays of an MD17 file, kcal/mol."""
    data = sample(formula, rows)
    return {
        "name": np.array(b"ethanol"),
        "type": np.array("d"),
        "z": data["numbers"].astype(np.uint8),
        "R": data["pos"].astype(np.float64),
        "E": data["energy"][:, None] / KCAL_PER_MOL,
        "F": data["forces"] / KCAL_PER_MOL,
        "r_unit": np.array(b"Ang"),
        "e_unit": np.array(b"kcal/mol"),
    }


def write_npz(path: Path, arrays: dict[str, np.ndarray], *, compressed: bool = True) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


def frames(formulas: Sequence[str] = boxes.FORMULAS, rows: int = 8) -> list[Atoms]:
    """Molecules with their labels, formulas taking turns."""
    found = []
    for row in range(rows):
        for formula in formulas:
            data = sample(formula, rows)
            atoms = Atoms(data["numbers"], data["pos"][row].astype(np.float64))
            atoms.calc = SinglePointCalculator(atoms, energy=data["energy"][row], forces=data["forces"][row])
            found.append(atoms)
    return found


def write_extxyz(path: Path, structures: Sequence[Atoms]) -> Path:
    ase.io.write(path, structures, format="extxyz")
    return path


def liquid(rows: int = 12, pairs: int = 2, seed: int = 0) -> list[dict]:
    """Configurations of ion pairs on a loose lattice, with labels of the pair potential."""
    rng = np.random.default_rng(seed)
    numbers = pairs * CATION + pairs * ANION
    corners = np.array([[x, y, z] for x in range(4) for y in range(4) for z in range(4)][: len(numbers)], dtype=float)
    found = []
    for _ in range(rows):
        edges = rng.uniform(5.5, 6.0, 3)
        pos = 1.35 * corners + 0.1 * rng.standard_normal(corners.shape)
        (atoms,) = boxes.labelled([Atoms(numbers, pos, cell=edges, pbc=True)])
        found.append(
            {
                "Cell-Size": edges.tolist(),
                "Positions": pos.tolist(),
                "Energy": atoms.get_potential_energy(),
                "Forces": atoms.get_forces().tolist(),
            }
        )
    return found


def write_lines(path: Path, objects: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in objects))
    return path
