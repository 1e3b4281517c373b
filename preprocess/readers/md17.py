"""MD17, revised MD17, MD22 and other sGDML files: one npz, the conformations of one molecule or crystal (spec 9.4).

`z` (N,), `R` (n, N, 3), `E` (n,) or (n, 1), `F` (n, N, 3), or the names of revised MD17; `lattice` (3, 3), its columns
the lattice vectors, where the system is periodic. Lengths are in Å and energies in kcal/mol unless `r_unit` and
`e_unit` say otherwise. The members of an npz cannot be read in part: a worker holds the arrays of the last file that it
opened (0.2 GB for the 211,762 conformations of aspirin).
"""

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from hpcmlip.errors import DataError
from hpcmlip.plugins import suggest
from hpcmlip.preprocess.config import LevelSource
from hpcmlip.preprocess.readers import Levels, RawFile, RawGroup, Rows, Version, version
from hpcmlip.units import BOHR, ENERGY_UNITS, formula

COMPONENT = "MD17, revised MD17, MD22 and other sGDML npz files: trajectories of one molecule, energies and forces"
ENERGY_UNIT = "kcal/mol"  # of atomic_energies; labels are in the unit that the file names
PRESETS = {"dft": LevelSource(energy="E", forces="F", method="DFT")}
DEFAULT_LEVELS = ("dft",)
OPTIONS: dict = {}

REVISED = {"z": "nuclear_charges", "R": "coords", "E": "energies", "F": "forces"}
"""Name in MD17 -> name in revised MD17."""
LENGTHS = {"ang": 1.0, "angstrom": 1.0, "å": 1.0, "a": 1.0, "bohr": BOHR, "a0": BOHR}
ENERGIES = {name.lower(): size for name, size in ENERGY_UNITS.items()} | {"hartree": ENERGY_UNITS["Ha"]}
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)


def open_file(path: Path, levels: Levels, options: dict) -> RawFile:
    """An opened file; raises DataError if it is absent, damaged or no npz, or lacks a key."""
    return NpzFile(path, levels)


class NpzFile(RawFile):
    """Its only group is named after the file."""

    def __init__(self, path: Path, levels: Levels):
        self.path, self.levels = Path(path), levels
        self.version = version(self.path)
        self.shapes = _shapes(self.version)

    def close(self) -> None:
        pass

    def groups(self) -> list[RawGroup]:
        atoms, coordinates = self._key("z"), self._key("R")
        if len(self.shapes[atoms]) != 1 or not self.shapes[atoms][0]:
            raise self._wrong_shape(atoms, "(N,) with at least one atom")
        N = self.shapes[atoms][0]
        if len(self.shapes[coordinates]) != 3 or self.shapes[coordinates][1:] != (N, 3):
            raise self._wrong_shape(coordinates, f"(n, {N}, 3)")
        n = self.shapes[coordinates][0]
        for key in {self._key(key) for level in self.levels for key in level.source.energy_keys}:
            if self.shapes[key] not in ((n,), (n, 1)):
                raise self._wrong_shape(key, f"({n},)")
        for key in {self._key(level.source.forces) for level in self.levels if level.source.forces}:
            if self.shapes[key] != (n, N, 3):
                raise self._wrong_shape(key, f"({n}, {N}, 3)")
        return [RawGroup(0, f"/{self.path.stem}", n, N)]

    def read(self, group: RawGroup, start: int, stop: int) -> Rows:
        arrays, rows = _load(self.version, self._wanted()), slice(start, stop)
        length, energy = self._unit(arrays, "r_unit", LENGTHS), self._unit(arrays, "e_unit", ENERGIES)
        numbers = self._numbers(arrays)
        energies = [
            sum(self._floats(arrays, key)[rows].reshape(-1).astype(np.float64) for key in level.source.energy_keys)
            for level in self.levels
        ]
        forces = [
            self._floats(arrays, level.source.forces)[rows] * np.float64(energy / length)
            for level in self.levels
            if level.source.forces
        ]
        R, shape = stop - start, (stop - start, 0, group.num_atoms, 3)
        return Rows(
            numbers=numbers,
            pos=(self._floats(arrays, "R")[rows] * np.float64(length)).astype(np.float32),
            energy=np.stack(energies, axis=1) * energy,
            forces=np.stack(forces, axis=1).astype(np.float32) if forces else np.empty(shape, dtype=np.float32),
            molecule=np.full(R, formula(np.where((numbers > 0) & (numbers < 119), numbers, 0))),
            **self._lattice(arrays, R, length),
        )

    def _wanted(self) -> tuple[str, ...]:
        """Names of the arrays that are read."""
        labels = [key for lv in self.levels for key in (*lv.source.energy_keys, lv.source.forces) if key]
        there = [key for key in ("lattice", "r_unit", "e_unit") if key in self.shapes]
        return tuple(sorted({self._key(key) for key in ("z", "R", *labels)}.union(there)))

    def _key(self, key: str) -> str:
        """The name that a key has in this file."""
        for name in (key, REVISED.get(key)):
            if name in self.shapes:
                return name
        users = [level.name for level in self.levels if key in (*level.source.energy_keys, level.source.forces)]
        why = f", which level '{users[0]}' needs" if users else ""
        raise DataError(f"{self.path} lacks the key '{key}'{why}{suggest(key, sorted(self.shapes))}")

    def _floats(self, arrays: dict[str, np.ndarray], key: str) -> np.ndarray:
        values = arrays[self._key(key)]
        if values.dtype.kind != "f" or values.dtype.itemsize < 4:
            raise DataError(f"{self.path}: '{key}' has the type {values.dtype}, expected float32 or float64")
        return values

    def _numbers(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        values = arrays[self._key("z")]
        if values.dtype.kind not in "iu":
            raise DataError(f"{self.path}: '{self._key('z')}' has the type {values.dtype}, expected atomic numbers")
        return values.astype(np.int64)

    def _unit(self, arrays: dict[str, np.ndarray], key: str, known: dict[str, float]) -> float:
        if key not in arrays:
            return 1.0 if key == "r_unit" else ENERGY_UNITS[ENERGY_UNIT]
        value = arrays[key].reshape(-1)[0] if arrays[key].size else ""
        name = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
        if name.lower() not in known:
            raise DataError(f"{self.path}: {key} is '{name}', expected one of {', '.join(known)}")
        return known[name.lower()]

    def _lattice(self, arrays: dict[str, np.ndarray], rows: int, length: float) -> dict[str, np.ndarray]:
        if "lattice" not in arrays:
            return {}
        if arrays["lattice"].shape != (3, 3):
            raise self._wrong_shape("lattice", "(3, 3)")
        cell = self._floats(arrays, "lattice").T.astype(np.float64) * length
        return {"cell": np.tile(cell, (rows, 1, 1)), "pbc": np.ones((rows, 3), dtype=bool)}

    def _wrong_shape(self, key: str, expected: str) -> DataError:
        return DataError(f"{self.path}: '{key}' has the shape {self.shapes[key]}, expected {expected}")


@lru_cache(maxsize=16)
def _shapes(source: Version) -> dict[str, tuple[int, ...]]:
    """Shape of each array, from the headers alone."""
    try:
        with zipfile.ZipFile(source.path) as file:
            return {name.removesuffix(".npy"): _shape(file, name) for name in file.namelist() if name.endswith(".npy")}
    except DAMAGED as error:
        raise _damaged(source.path, error) from None


def _shape(file: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with file.open(name) as member:
        is_old = np.lib.format.read_magic(member) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if is_old else np.lib.format.read_array_header_2_0
        return read(member)[0]


@lru_cache(maxsize=1)
def _load(source: Version, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    try:
        with np.load(source.path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except DAMAGED as error:
        raise _damaged(source.path, error) from None


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).replace("\n", " ")
    return DataError(f"the source {path} is no npz file, or a truncated or damaged one ({reason}); fetch it again")
