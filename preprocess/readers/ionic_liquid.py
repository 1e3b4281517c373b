"""Ethylammonium nitrate (EAN), an ionic liquid: one JSON object a line, a box of ion pairs (spec 9.5).

`Cell-Size` three edges in Å, `Positions` and `Forces` (N, 3) in Å and eV/Å, `Energy` in eV. The elements are not
stored: all cations come first, each in the order N HHH C HH C HHH, then all anions, each N OOO.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from hpcmlip.errors import DataError
from hpcmlip.plugins import suggest
from hpcmlip.preprocess.config import LevelSource
from hpcmlip.preprocess.readers import Levels, RawFile, RawGroup, Rows, Version, version
from hpcmlip.units import formula

COMPONENT = "Ethylammonium nitrate: periodic boxes of ion pairs, DFT energies and forces"
ENERGY_UNIT = "eV"
PRESETS = {"dft": LevelSource(energy="Energy", forces="Forces", method="DFT")}
DEFAULT_LEVELS = ("dft",)
OPTIONS: dict = {}

CATION = (7, 1, 1, 1, 6, 1, 1, 6, 1, 1, 1)
ANION = (7, 8, 8, 8)


def open_file(path: Path, levels: Levels, options: dict) -> RawFile:
    """An opened file; raises DataError if it is absent, empty, or its first line no configuration."""
    return JsonLines(path, levels)


class JsonLines(RawFile):
    """Its only group is named after the file. Raises DataError naming the line that is no configuration."""

    def __init__(self, path: Path, levels: Levels):
        self.path, self.levels = Path(path), levels
        self.starts, self.lines = _lines(version(self.path))
        self.file = self.path.open("rb")

    def close(self) -> None:
        self.file.close()

    def groups(self) -> list[RawGroup]:
        if not len(self.starts):
            return []
        num_atoms = len(self._values(0, "Positions", (None, 3)))
        pair = len(CATION) + len(ANION)
        if not num_atoms or num_atoms % pair:
            raise self._wrong(0, f"has {num_atoms} atoms, expected a multiple of the {pair} of an ion pair")
        return [RawGroup(0, f"/{self.path.stem}", len(self.starts), num_atoms)]

    def read(self, group: RawGroup, start: int, stop: int) -> Rows:
        N, R, rows = group.num_atoms, stop - start, range(start, stop)
        pairs = N // (len(CATION) + len(ANION))
        numbers = np.array(pairs * CATION + pairs * ANION, dtype=np.int64)
        forces = [level.source.forces for level in self.levels if level.source.forces]
        frames = [self._frame(row) for row in rows]

        def values(key: str, shape: tuple[int, ...]) -> np.ndarray:
            return np.array([self._array(row, frame, key, shape) for row, frame in zip(rows, frames, strict=True)])

        energy = [sum(values(key, ()) for key in level.source.energy_keys) for level in self.levels]
        return Rows(
            numbers=numbers,
            pos=values("Positions", (N, 3)).astype(np.float32),
            energy=np.stack(energy, axis=1),
            forces=np.stack([values(key, (N, 3)) for key in forces], axis=1).astype(np.float32)
            if forces
            else np.empty((R, 0, N, 3), dtype=np.float32),
            molecule=np.full(R, formula(numbers)),
            cell=values("Cell-Size", (3,))[:, :, None] * np.eye(3),
            pbc=np.ones((R, 3), dtype=bool),
        )

    def _frame(self, row: int) -> dict:
        self.file.seek(self.starts[row])
        try:
            frame = json.loads(self.file.readline())
        except (ValueError, RecursionError) as error:
            raise self._wrong(row, f"is no JSON ({error}); fetch the file again") from None
        if not isinstance(frame, dict):
            raise self._wrong(row, "holds no JSON object")
        return frame

    def _values(self, row: int, key: str, shape: tuple) -> np.ndarray:
        return self._array(row, self._frame(row), key, shape)

    def _array(self, row: int, frame: dict, key: str, shape: tuple) -> np.ndarray:
        """A value of a configuration; None in `shape` stands for any length."""
        if key not in frame:
            raise self._wrong(row, f"lacks the key '{key}'{suggest(key, sorted(frame))}")
        try:
            values = np.array(frame[key], dtype=np.float64)
        except (ValueError, TypeError):
            raise self._wrong(row, f"'{key}' holds something else than numbers") from None
        fits = len(values.shape) == len(shape) and all(
            want in (None, n) for n, want in zip(values.shape, shape, strict=True)
        )
        if not fits:
            expected = str(shape).replace("None", "N")
            raise self._wrong(row, f"'{key}' has the shape {values.shape}, expected {expected}")
        return values

    def _wrong(self, row: int, what: str) -> DataError:
        return DataError(f"{self.path}: line {self.lines[row]}: {what}")


@lru_cache(maxsize=16)
def _lines(source: Version) -> tuple[np.ndarray, np.ndarray]:
    """(byte at which it starts, number from 1) of each line that is not blank."""
    starts, numbers, at = [], [], 0
    with source.path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                starts.append(at)
                numbers.append(number)
            at += len(line)
    return np.array(starts, dtype=np.int64), np.array(numbers, dtype=np.int64)
