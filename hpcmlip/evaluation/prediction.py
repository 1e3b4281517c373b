"""`hpcmlip predict`: energies, forces and ensemble spread of structures in the formats that ASE reads by itself."""

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import ase.io.formats
import numpy as np
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii
from ase.stress import full_3x3_to_voigt_6_stress
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from hpcmlip.batch import AtomsBatch
from hpcmlip.data.plan import pairs
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.evaluation.members import Ensemble, find_members, load_members
from hpcmlip.evaluation.sums import std
from hpcmlip.lattice import LARGEST_DENSE, lacks_volume, nearest_distances
from hpcmlip.launch import World
from hpcmlip.neighbours import topology
from hpcmlip.training.setup import choose_device

log = logging.getLogger(__name__)

PAIRS_PER_BLOCK = 20_000
WINDOW = 4096
"""Structures that are held at a time."""
BONDS = (0.5, 1.6)
"""Of `bond_ratio`; molecules are near 1, coordinates in bohr near 1.9."""
STARTS_PROGRAMS = {"castep-cell"}
"""Formats of ASE whose readers run what they find in PATH."""


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
    stress: np.ndarray | None = None
    """[3, 3] eV/Å³, positive under tension, of a structure that is periodic in three directions; None for others, and
    if a model's forces are no gradient."""


def predict(models: Sequence[Path], structures: Path, out: Path, *, level: str | None = None) -> None:
    """Write `structures` with energy, forces, energy_std, forces_std and level as extended XYZ; in eV and eV/Å.

    Those that are periodic in three directions get their stress in eV/Å³ too, if the models have one. Energies and
    forces that came with the structures stay, as ref_energy and ref_forces. Raises ConfigError for an unknown level or
    if `out` is `structures`, DataError for a file or a structure that cannot be used; `out` then stays as it was.
    """
    if Path(out).resolve() == Path(structures).resolve():
        raise ConfigError(f"-o {out} is the file of the structures itself: write the predictions into another")
    found = find_members(models)
    for item in found.left_out:
        log.warning("left out: %s: %s", item["run"], item["reason"])
    ensemble = load_members(found.runs, device=choose_device("auto", World()))
    level = level or default_level(ensemble)
    ensemble.check_level(level)
    temporary = Path(out).with_name(f".{Path(out).name}.{os.getpid()}.tmp")
    spreads: list[float | None] = []
    odd: list[int] = []
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for window in _windows(Path(structures)):
                for atoms, said in zip(window, estimate(ensemble, window, level, first=len(spreads)), strict=True):
                    ase.io.write(file, _annotated(atoms, said, level), format="extxyz")
                    if not BONDS[0] < bond_ratio(atoms) < BONDS[1]:
                        odd.append(len(spreads))
                    spreads.append(said.energy_std)
        if not spreads:
            raise DataError(f"{structures} holds no structure")
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{len(spreads)} structures at level {level} with {len(ensemble.members)} models -> {out} (eV, eV/Å)")
    print(_about_spread(spreads))
    if odd:
        log.warning(
            "in %d structure(s), of which %d is the first, the two nearest atoms are nearer than %g or farther than %g "
            "bond lengths: are the coordinates in Å? Of such structures the models know nothing",
            *(len(odd), odd[0], *BONDS),
        )


def _about_spread(spreads: Sequence[float | None]) -> str:
    if None in spreads:
        return "one model, so there is no spread between models: nothing here tells how far the numbers may be off"
    worst = int(np.argmax(spreads))
    return (
        f"energy_std, the standard deviation between models: median {np.median(spreads):.3g} eV, largest "
        f"{spreads[worst]:.3g} eV (structure {worst}); how it relates to errors is in the report of 'hpcmlip evaluate'"
    )


def bond_ratio(atoms: Atoms) -> float:
    """Distance of the two nearest atoms over the sum of their covalent radii; 1 for a single atom.

    Of a periodic structure the nearest images count, and the average radius.
    """
    if len(atoms) < 2:
        return 1.0
    radii = covalent_radii[atoms.numbers]
    if atoms.pbc.any():
        reach = 4 * radii.mean()
        nearest = nearest_distances(atoms.positions[None], atoms.cell[:][None], atoms.pbc[None], reach)[0]
        return float(nearest / (2 * radii.mean()))
    if len(atoms) > LARGEST_DENSE:
        tree = cKDTree(atoms.positions)
        distance, neighbour = (x[:, 1] for x in tree.query(atoms.positions, k=2))
        return float((distance / (radii + radii[neighbour])).min())
    bonds = radii[:, None] + radii
    np.fill_diagonal(bonds, np.nan)
    return float(np.nanmin(cdist(atoms.positions, atoms.positions) / bonds))


def default_level(ensemble: Ensemble) -> str:
    """The last level of the config that the models were trained with."""
    return tuple(ensemble.first.trained)[-1]


def estimate(ensemble: Ensemble, structures: Sequence[Atoms], level: str, *, first: int | None = 0) -> list[Estimate]:
    """One estimate a structure, in order; equally large ones are computed together.

    `first` is the number of the first structure, for messages; None: the structure has no number. Raises DataError for
    an element that the models do not know, a periodic structure for models of molecules, a cell without volume, no
    atoms, or coordinates that give no finite result.
    """
    names = ["the structure" if first is None else f"structure {first + i}" for i in range(len(structures))]
    for atoms, name in zip(structures, names, strict=True):
        check(ensemble, atoms, name)
    estimates: list[Estimate | None] = [None] * len(structures)
    for rows in _alike(structures):
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
        flags = " ".join("T" if p else "F" for p in atoms.pbc)
        ensemble.check_periodic(f"{name} (pbc {flags}; a molecule in a box would have F F F)")
    if lacks_volume(atoms.cell[None], atoms.pbc[None]).any():
        raise DataError(f"{name} is periodic, but its cell {atoms.cell.tolist()} has no volume")
    if not np.isfinite(atoms.positions).all():
        raise DataError(f"{name} has coordinates that are not finite numbers")
    ensemble.check_elements(atoms.numbers, name)


def _alike(structures: Sequence[Atoms]) -> Iterator[list[int]]:
    """Rows of structures of one size, all periodic or none, as many as are computed together."""
    kinds = np.array([(len(atoms), bool(atoms.pbc.any())) for atoms in structures])
    for size, periodic in np.unique(kinds, axis=0).tolist():
        rows = np.flatnonzero((kinds == (size, periodic)).all(axis=1)).tolist()
        step = max(1, PAIRS_PER_BLOCK // pairs(size, periodic=bool(periodic)))
        yield from (rows[i : i + step] for i in range(0, len(rows), step))


def _estimate_block(ensemble: Ensemble, structures: Sequence[Atoms], level: str) -> list[Estimate]:
    B, N = len(structures), len(structures[0])
    pos = np.stack([atoms.positions for atoms in structures])
    cell, pbc = np.stack([atoms.cell[:] for atoms in structures]), np.stack([atoms.pbc for atoms in structures])
    block = AtomsBatch(
        species=torch.zeros(B * N, dtype=torch.int64),  # `ask` goes by the atomic numbers
        pos=torch.from_numpy(pos.reshape(-1, 3)),
        topology=topology(pos, ensemble.cutoff, cell=cell, pbc=pbc),
        energy=None,
        forces=None,
        weight=torch.ones(B, dtype=torch.float64),
        source=np.zeros((B, 4), dtype=np.int64),
    )
    numbers = np.stack([atoms.numbers for atoms in structures])
    (answer,) = ensemble.ask([block], [numbers], [level], [level], stress=ensemble.is_conservative)
    energy, forces = answer.energy[:, :, 0], answer.forces[:, :, :, 0]
    # along an open direction a cell has no length of its own, hence no volume
    has_stress = pbc.all(axis=1) & (answer.stress is not None)
    many = len(energy) > 1
    energy_std, forces_std = std(energy), std(forces)
    return [
        Estimate(
            energy=float(energy[:, b].mean()),
            forces=forces[:, b].mean(axis=0),
            energy_std=float(energy_std[b]) if many else None,
            forces_std=forces_std[b] if many else None,
            stress=answer.stress[:, b, 0].mean(axis=0) if has_stress[b] else None,
        )
        for b in range(B)
    ]


def _annotated(atoms: Atoms, said: Estimate, level: str) -> Atoms:
    """The structure with what was said of it; labels that came with it get other names."""
    result = atoms.copy()
    came_with = {} if atoms.calc is None else atoms.calc.results
    if "energy" in came_with:
        result.info["ref_energy"] = came_with["energy"]
    if "forces" in came_with:
        result.arrays["ref_forces"] = came_with["forces"]
    stress = {} if said.stress is None else {"stress": full_3x3_to_voigt_6_stress(said.stress)}
    result.calc = SinglePointCalculator(result, energy=said.energy, forces=said.forces, **stress)
    for name in ("energy", "forces", "stress", "energy_std", "forces_std"):
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
    structures, count = _opened(path), 0
    while True:
        try:
            atoms = next(structures)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:  # ASE's readers raise whatever their parsing raises; here is a border to the user
            reason = next(iter(str(error).strip().splitlines()), "no reason given")
            raise DataError(
                f"ASE cannot read structure {count} of {path} ({type(error).__name__}: {reason}); "
                "expected a file of structures such as extended XYZ"
            ) from None
        yield atoms
        count += 1


def _opened(path: Path) -> Iterator[Atoms]:
    """ASE's reader of a file; raises DataError for a format whose reader does more than read."""
    # absolute: ASE takes a name that begins with postgres or mysql for a server
    name = str(path.absolute())
    kind = ase.io.formats.filetype(name)
    known = ase.io.formats.ioformats.get(kind)
    if kind in STARTS_PROGRAMS or (known is not None and not known.module_name.startswith("ase.io.")):
        raise DataError(
            f"{path} is read as {kind}, whose reader may run programs or is a plug-in's: convert it to extended XYZ"
        )
    yield from ase.io.iread(name, index=":", format=kind, do_not_split_by_at_sign=True)
