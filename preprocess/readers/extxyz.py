"""Extended XYZ, as ASE reads it: frames of any composition, each with its own cell and periodic directions.

A level names a key of the comment line for the energy (eV) and a column for the forces (eV/Å): `energy` and `forces`
unless DATA.yaml says otherwise, such as `{energy: REF_energy, forces: REF_forces}`. A frame without a key has no such
label. Stress and virial of a frame are not read. The frames with one list of elements, in order, are a group. Each
process walks through a file once to find its frames; after that a frame costs one seek and its own bytes.
"""

import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from ase import Atoms
from ase.io.extxyz import parse_properties, read_xyz

from hpcmlip.errors import DataError
from hpcmlip.plugins import suggest
from hpcmlip.preprocess.config import LevelSource
from hpcmlip.preprocess.readers import Levels, RawFile, RawGroup, Rows, Version, version
from hpcmlip.units import ATOMIC_NUMBERS, SYMBOLS, formula

COMPONENT = "Extended XYZ: molecules and periodic structures of any composition, energies in eV, forces in eV/Å"
ENERGY_UNIT = "eV"
PRESETS = {"reference": LevelSource(energy="energy", forces="forces")}
DEFAULT_LEVELS = ("reference",)
OPTIONS: dict = {}

PROPERTIES = re.compile(r"""Properties=("[^"]*"|'[^']*'|\S+)""")
STRUCTURE_KEYS = {"Lattice", "Properties", "pbc", "pos", "species", "Z"}
KEY = re.compile(r"([^\s=\"'{}\[\]]+)\s*=")


def open_file(path: Path, levels: Levels, options: dict) -> RawFile:
    """An opened file; raises DataError if it is absent, empty or ends within a frame."""
    return XyzFile(path, levels)


class XyzFile(RawFile):
    """Frames by group. Raises DataError naming the frame (from 0) that cannot be read."""

    def __init__(self, path: Path, levels: Levels):
        self.path, self.levels = Path(path), levels
        self.index = _index(version(self.path))
        self.file = self.path.open("rb")

    def close(self) -> None:
        self.file.close()

    def groups(self) -> list[RawGroup]:
        for level in self.levels:
            for key in (*level.source.energy_keys, *([level.source.forces] if level.source.forces else [])):
                if key not in self.index.keys:
                    raise self._lacks(key, level.name)
        groups = sorted(self.index.groups.items())
        return [RawGroup(i, path, len(g.frames), len(g.numbers)) for i, (path, g) in enumerate(groups)]

    def read(self, group: RawGroup, start: int, stop: int) -> Rows:
        numbers, frames = self.index.groups[group.path].numbers, self.index.groups[group.path].frames[start:stop]
        structures = [self._structure(frame) for frame in frames.tolist()]
        energy = np.zeros((len(frames), len(self.levels)))
        with_forces = [level.source.forces for level in self.levels if level.source.forces]
        forces = np.empty((len(frames), len(with_forces), len(numbers), 3), dtype=np.float32)
        for row, (frame, atoms) in enumerate(zip(frames.tolist(), structures, strict=True)):
            for column, level in enumerate(self.levels):
                for key in level.source.energy_keys:
                    energy[row, column] += self._label(frame, atoms, key, ())
            for plane, key in enumerate(with_forces):
                forces[row, plane] = self._label(frame, atoms, key, (len(numbers), 3))
        pbc = np.array([atoms.pbc for atoms in structures])
        return Rows(
            numbers=numbers,
            pos=np.array([atoms.positions for atoms in structures], dtype=np.float32),
            energy=energy,
            forces=forces,
            molecule=np.full(len(frames), formula(numbers)),
            # the box around a molecule says nothing
            cell=np.array([atoms.cell[:] if atoms.pbc.any() else np.zeros((3, 3)) for atoms in structures]),
            pbc=pbc,
        )

    def _structure(self, frame: int) -> Atoms:
        start, stop = self.index.edges[frame : frame + 2].tolist()
        self.file.seek(start)
        text = self.file.read(stop - start)
        try:
            return next(read_xyz(io.StringIO(text.decode()), 0))
        except Exception as error:  # ASE's parsing raises whatever it comes across; here is a border to the user
            reason = next(iter(str(error).strip().splitlines()), "no reason given")
            raise self._wrong(frame, f"ASE cannot read it ({type(error).__name__}: {reason})") from None

    def _label(self, frame: int, atoms: Atoms, key: str, shape: tuple[int, ...]) -> np.ndarray | float:
        """A label as ASE keeps it: standard names move from the frame into the results of a calculator."""
        results = {} if atoms.calc is None else atoms.calc.results
        found = [where[key] for where in (results, atoms.info, atoms.arrays) if key in where]
        if not found:
            return np.nan
        try:
            values = np.asarray(found[0], dtype=np.float64)
        except (TypeError, ValueError):
            raise self._wrong(frame, f"'{key}' is {found[0]!r}, expected numbers") from None
        if values.shape != shape:
            raise self._wrong(frame, f"'{key}' has the shape {values.shape}, expected {shape}")
        return values

    def _lacks(self, key: str, level: str) -> DataError:
        known = sorted(self.index.keys - STRUCTURE_KEYS)
        hint = suggest(key, known) if known else " (there are only those of the structures: a file without labels?)"
        return DataError(
            f"{self.path}: no frame has the key '{key}', which level '{level}' needs{hint}; "
            "give the keys of the file to 'levels' of the config"
        )

    def _wrong(self, frame: int, what: str) -> DataError:
        return DataError(f"{self.path}: frame {frame}: {what}")


# ------------------------------------------------------------------------------------------------ finding frames


@dataclass(frozen=True)
class Group:
    """Frames with one list of elements."""

    numbers: np.ndarray
    """[N] int64."""
    frames: np.ndarray
    """[R] int64, ascending."""


@dataclass(frozen=True)
class Index:
    """What one walk through a file finds."""

    edges: np.ndarray
    """[frames + 1] int64: bytes at which frames begin, and where the last one ends."""
    groups: dict[str, Group]
    """By path: the formula and a hash of the elements in order."""
    keys: frozenset[str]
    """Names in comment lines and of columns, in any frame."""


@lru_cache(maxsize=4)
def _index(source: Version) -> Index:
    starts, at, keys = [], 0, set()
    frames: dict[bytes, list[int]] = defaultdict(list)
    atoms: dict[bytes, bytes] = {}
    with source.path.open("rb") as file:
        for frame, (symbols, comment, size) in enumerate(_walk(source.path, file)):
            if symbols not in atoms:
                atoms[symbols] = _numbers(source.path, symbols, frame)
            frames[atoms[symbols]].append(frame)
            starts.append(at)
            at += size
            keys.update(_names(comment))
    groups = {}
    for numbers, rows in frames.items():
        z = np.frombuffer(numbers, dtype=np.uint8).astype(np.int64)
        path = f"/{formula(z)}/{hashlib.sha256(numbers).hexdigest()[:8]}"
        groups[path] = Group(z, np.array(rows, dtype=np.int64))
    return Index(np.array([*starts, at], dtype=np.int64), groups, frozenset(keys))


def _walk(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, str, int]]:
    """(elements separated by blanks, comment line, bytes) of each frame. Raises DataError where it is none."""
    frame = 0
    while head := file.readline():
        if not head.strip():
            if file.read().strip():
                raise DataError(f"{path}: frame {frame}: expected a number of atoms, got a blank line")
            return
        try:
            num_atoms = int(head)
        except ValueError:
            raise DataError(f"{path}: frame {frame}: expected a number of atoms, got {_shown(head)}") from None
        try:
            comment = file.readline().decode()
        except UnicodeDecodeError:
            raise DataError(f"{path}: frame {frame}: the comment line is not UTF-8; convert the file") from None
        column = _element_column(path, frame, comment)
        # no more than the file has, whatever the head of a damaged one says
        lines = list(islice(iter(file.readline, b""), max(num_atoms, 0)))
        if len(lines) < num_atoms or not lines:
            raise DataError(
                f"{path}: frame {frame}: {len(lines)} of {num_atoms} atoms are there; is the file truncated?"
            )
        try:
            symbols = [line.split(None, column + 1)[column] for line in lines]
        except IndexError:
            raise DataError(f"{path}: frame {frame}: a line of its atoms has too few columns") from None
        yield b" ".join(symbols), comment, len(head) + len(comment.encode()) + sum(map(len, lines))
        frame += 1


def _shown(line: bytes) -> str:
    text = line[:40].decode(errors="replace").strip()
    if "\ufffd" in text or not text.isprintable():
        return "binary data (a compressed file must be unpacked)"
    return f"'{text}'"


def _element_column(path: Path, frame: int, comment: str) -> int:
    found = PROPERTIES.search(comment)
    try:
        return _columns(found[1].strip("\"'") if found else "species:S:1:pos:R:3")
    except (ValueError, KeyError):
        raise DataError(
            f"{path}: frame {frame}: Properties must name species (or Z) and pos as name:type:columns, got '{found[1]}'"
        ) from None


@lru_cache(maxsize=64)
def _columns(properties: str) -> int:
    """Column of the elements. Raises KeyError if there is none, or none of the positions."""
    by_name, names, _, _ = parse_properties(properties)
    first, column = {}, 0
    for name in names:
        ase_name, width = by_name[name]
        first[ase_name] = column
        column += width
    if first.get("positions") is None:
        raise KeyError("positions")
    return first["numbers"] if "numbers" in first else first["symbols"]


def _names(comment: str) -> frozenset[str]:
    found = PROPERTIES.search(comment)
    columns = found[1].strip("\"'").split(":")[::3] if found else []
    return frozenset(columns).union(KEY.findall(comment))


def _numbers(path: Path, symbols: bytes, frame: int) -> bytes:
    """Atomic numbers, a byte each, of symbols or numbers separated by blanks."""
    texts = symbols.decode(errors="replace").split(" ")
    numbers = [int(text) if text.isdecimal() else ATOMIC_NUMBERS.get(text.capitalize(), 0) for text in texts]
    for text, number in zip(texts, numbers, strict=True):
        if not 0 < number < len(SYMBOLS):
            raise DataError(f"{path}: frame {frame}: '{text}' is no element")
    return bytes(numbers)
