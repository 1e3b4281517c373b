"""`hpcmlip predict`: energies, forces and ensemble spread of structures in any format that ASE reads."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from hpcmlip.batch import AtomsBatch
from hpcmlip.errors import DataError
from hpcmlip.evaluation.members import Ensemble, find_members, load_members
from hpcmlip.evaluation.sums import std
from hpcmlip.graph import DenseTopology

log = logging.getLogger(__name__)

PAIRS_PER_BLOCK = 20_000
WINDOW = 4096
"""Structures that are held at a time."""


@dataclass(frozen=True)
class Estimate:
    """Mean prediction for one structure of N atoms at one level of theory, and how far the members disagree."""

    energy: float
    """eV, total."""
    forces: np.ndarray
    """[N, 3] eV/Å."""
    energy_std: float | None
    """Standard deviation over members (n - 1); None for one member, which cannot tell."""
    forces_std: np.ndarray | None
    """[N, 3], of each component."""


def predict(models: Sequence[Path], structures: Path, out: Path, *, level: str | None = None) -> None:
    """Write `structures` with energy, forces, energy_std, forces_std and level as extended XYZ; in eV and eV/Å.

    Raises ConfigError for an unknown level, DataError for a file or a structure that cannot be used; `out` then stays
    as it was.
    """
    found = find_members(models)
    for item in found.left_out:
        log.warning("left out: %s: %s", item["run"], item["reason"])
    ensemble = load_members(found.runs)
    level = level or default_level(ensemble)
    ensemble.check_level(level)
    temporary = Path(out).with_name(f".{Path(out).name}.{os.getpid()}.tmp")
    count = 0
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for window in _windows(Path(structures)):
                for atoms, said in zip(window, estimate(ensemble, window, level, first=count), strict=True):
                    ase.io.write(file, _annotated(atoms, said, level), format="extxyz")
                count += len(window)
        if not count:
            raise DataError(f"{structures} holds no structure")
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{count} structures at level {level} with {len(ensemble.members)} models -> {out}")


def default_level(ensemble: Ensemble) -> str:
    """The last level of the config that the models were trained with."""
    return tuple(ensemble.first.trained)[-1]


def estimate(ensemble: Ensemble, structures: Sequence[Atoms], level: str, *, first: int | None = 0) -> list[Estimate]:
    """One estimate a structure, in order; equally large ones are computed together.

    `first` is the number of the first structure, for messages; None: the structure has no number. Raises DataError for
    an element that the models do not know, a periodic structure, no atoms, or coordinates that give no finite result.
    """
    names = ["the structure" if first is None else f"structure {first + i}" for i in range(len(structures))]
    for atoms, name in zip(structures, names, strict=True):
        check(ensemble, atoms, name)
    estimates: list[Estimate | None] = [None] * len(structures)
    for rows in _equal_sizes(structures):
        parts = _estimate_block(ensemble, [structures[i] for i in rows], level)
        for i, said in zip(rows, parts, strict=True):
            if not (np.isfinite(said.energy) and np.isfinite(said.forces).all()):
                raise DataError(f"{names[i]} gives no finite energy and forces: do two atoms stand on one place?")
            estimates[i] = said
    return estimates


def check(ensemble: Ensemble, atoms: Atoms, name: str) -> None:
    """Raises DataError if the models cannot say anything of this structure."""
    if not len(atoms):
        raise DataError(f"{name} has no atoms")
    if atoms.pbc.any():
        raise DataError(
            f"{name} is periodic (pbc {' '.join('T' if p else 'F' for p in atoms.pbc)}): these models compute "
            "molecules only; set pbc to F F F if it is a molecule in a box"
        )
    if not np.isfinite(atoms.positions).all():
        raise DataError(f"{name} has coordinates that are not finite numbers")
    ensemble.check_elements(atoms.numbers, name)


def _equal_sizes(structures: Sequence[Atoms]) -> Iterator[list[int]]:
    sizes = np.array([len(atoms) for atoms in structures])
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size).tolist()
        step = max(1, PAIRS_PER_BLOCK // int(size) ** 2)
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


def _estimate_block(ensemble: Ensemble, structures: Sequence[Atoms], level: str) -> list[Estimate]:
    B, N = len(structures), len(structures[0])
    block = AtomsBatch(
        species=torch.zeros(B * N, dtype=torch.int64),  # `ask` goes by the atomic numbers
        pos=torch.from_numpy(np.concatenate([atoms.positions for atoms in structures])),
        topology=DenseTopology(B, N),
        energy=None,
        forces=None,
        weight=torch.ones(B, dtype=torch.float64),
        source=np.zeros((B, 4), dtype=np.int64),
    )
    numbers = np.stack([atoms.numbers for atoms in structures])
    (answer,) = ensemble.ask([block], [numbers], [level], [level])
    energy, forces = answer.energy[:, :, 0], answer.forces[:, :, :, 0]
    many = len(energy) > 1
    energy_std, forces_std = std(energy), std(forces)
    return [
        Estimate(
            energy=float(energy[:, b].mean()),
            forces=forces[:, b].mean(axis=0),
            energy_std=float(energy_std[b]) if many else None,
            forces_std=forces_std[b] if many else None,
        )
        for b in range(B)
    ]


def _annotated(atoms: Atoms, said: Estimate, level: str) -> Atoms:
    """The structure with what was said of it; labels that came with it make way."""
    result = atoms.copy()
    result.calc = SinglePointCalculator(result, energy=said.energy, forces=said.forces)
    for name in ("energy", "forces", "energy_std", "forces_std"):
        result.info.pop(name, None)
        result.arrays.pop(name, None)
    result.info["level"] = level
    if said.energy_std is not None:
        result.info["energy_std"] = said.energy_std
        result.arrays["forces_std"] = said.forces_std
    return result


def _windows(path: Path) -> Iterator[list[Atoms]]:
    """The structures of a file, a bounded number at a time."""
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
    structures = _readable(path)
    while window := list(islice(structures, WINDOW)):
        yield window


def _readable(path: Path) -> Iterator[Atoms]:
    structures, count = ase.io.iread(path, index=":"), 0
    while True:
        try:
            atoms = next(structures)
        except StopIteration:
            return
        except Exception as error:  # ASE's readers raise whatever their parsing raises; here is a border to the user
            reason = next(iter(str(error).strip().splitlines()), "no reason given")
            raise DataError(
                f"ASE cannot read structure {count} of {path} ({type(error).__name__}: {reason}); "
                "expected a file of structures such as extended XYZ"
            ) from None
        yield atoms
        count += 1
