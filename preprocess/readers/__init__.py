"""Raw files, one module a data set: each lists the groups of a file and reads rows of a group in internal units.

A reader module has
    COMPONENT        one line for humans
    ENERGY_UNIT      unit of the file's energies (its forces are per Å), a key of `units.ENERGY_UNITS`
    PRESETS          level name -> LevelSource: the levels of theory of that data set
    DEFAULT_LEVELS   presets that are taken when DATA.yaml names no level
    OPTIONS          option -> default; the type of the default is the type expected
    open_file(path, levels, options) -> RawFile
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcmlip.errors import DataError
from hpcmlip.preprocess.config import LevelSource


@dataclass(frozen=True)
class RawGroup:
    """Conformations of one list of atoms in a raw file."""

    ordinal: int
    """Position among the groups of the file, sorted by path."""
    path: str
    rows: int
    num_atoms: int


@dataclass(frozen=True)
class Rows:
    """R conformations of a group in internal units; L levels, Lf of them with forces, in the order of the config."""

    numbers: np.ndarray
    """[N] int64 atomic numbers; 0 for a symbol that is no element."""
    pos: np.ndarray
    """[R, N, 3] float32 Å."""
    energy: np.ndarray
    """[R, L] float64 eV, totals; NaN: no label."""
    forces: np.ndarray
    """[R, Lf, N, 3] float32 eV/Å, true forces -dE/dR; NaN: no label."""
    molecule: np.ndarray
    """[R] str: SMILES where the file has it, else the formula."""
    cell: np.ndarray | None = None
    """[R, 3, 3] float64 Å, rows are lattice vectors; None: molecules."""
    pbc: np.ndarray | None = None
    """[R, 3] bool: along which lattice vectors a structure repeats; None: molecules."""


class RawFile(ABC):
    """An opened raw file; a context manager."""

    @abstractmethod
    def groups(self) -> list[RawGroup]:
        """Every group of the file, sorted by path. Raises DataError where one lacks a key that a level needs."""

    @abstractmethod
    def read(self, group: RawGroup, start: int, stop: int) -> Rows:
        """Rows [start, stop) of a group. Raises DataError naming file, group and key."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> "RawFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass(frozen=True)
class RawLevel:
    """A level of theory as a reader needs it: its name and its keys."""

    name: str
    source: LevelSource


Levels = Sequence[RawLevel]
PathLike = Path | str


@dataclass(frozen=True)
class Version:
    """A file as it is now: what was found in it may be kept in memory as long as this stays the same."""

    path: Path
    size: int
    mtime_ns: int


def version(path: Path) -> Version:
    """Raises DataError for a file that is absent or empty."""
    try:
        stat = path.stat()
        path.open("rb").close()
    except OSError as error:
        raise DataError(f"cannot read the source {path}: {error.strerror}") from None
    if not stat.st_size:
        raise DataError(f"the source {path} is empty; fetch it again")
    return Version(path, stat.st_size, stat.st_mtime_ns)
