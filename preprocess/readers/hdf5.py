"""The HDF5 layouts of the ANI family: groups with coordinates (Nc, Na, 3), a list of atoms, and labels by key."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import h5py
import numpy as np

from hpcmlip.errors import DataError
from hpcmlip.plugins import suggest
from hpcmlip.preprocess.readers import Levels, RawFile, RawGroup, Rows
from hpcmlip.units import ATOMIC_NUMBERS, ENERGY_UNITS, formula

log = logging.getLogger(__name__)

SIGNATURE = b"\x89HDF\r\n\x1a\n"
COORDINATES = "coordinates"
HIGH_ENERGY = "HE"
"""Suffix of the keys of ANI-1's conformations beside the main list."""
CACHE_BYTES = 8 << 20
BROKEN = (OSError, RuntimeError, KeyError, ValueError, TypeError)
"""What h5py raises for damaged files."""


@dataclass(frozen=True)
class Layout:
    """What differs between the data sets."""

    atoms: str
    """Key of the atomic numbers or symbols, (Na,)."""
    energy_unit: str = "Ha"
    force_sign: float = 1.0
    """-1 where the file stores gradients."""
    smiles: Literal["rows", "letters"] | None = None
    """`smiles` is one string a row (Nc,), or the letters of one string for the group; either may be absent."""
    suffixes: tuple[str, ...] = ("",)
    """Each appended to the keys of coordinates and energies gives further rows of the same group (ANI-1's `HE`)."""


class Hdf5File(RawFile):
    """An HDF5 file of one of these layouts. Raises DataError if it is absent, empty, truncated or no HDF5."""

    def __init__(self, path: Path, levels: Levels, layout: Layout):
        self.path, self.levels, self.layout = Path(path), levels, layout
        self.file = _open(self.path)

    def close(self) -> None:
        self.file.close()

    def groups(self) -> list[RawGroup]:
        try:
            paths = sorted(self._walk("/", self.file.id, set()))
        except BROKEN as error:
            raise self._damaged("/", error) from None
        if not paths:
            raise DataError(
                f"{self.path} has no group with the key '{COORDINATES}'; is it the right file for this reader?"
            )
        return [self._describe(ordinal, path) for ordinal, path in enumerate(paths)]

    def read(self, group: RawGroup, start: int, stop: int) -> Rows:
        try:
            node = self.file[group.path]
            numbers = self._numbers(node, group)
            parts = [
                self._read_part(node, numbers, suffix, *span) for suffix, *span in self._spans(node, group, start, stop)
            ]
        except BROKEN as error:
            raise self._damaged(group.path, error) from None
        if len(parts) == 1:
            return parts[0]
        joined = {name: np.concatenate([getattr(p, name) for p in parts]) for name in ROW_FIELDS}
        return Rows(numbers=numbers, **joined)

    # ------------------------------------------------------------------------------------------- finding groups

    def _walk(self, path: str, node: h5py.h5g.GroupID, seen: set) -> Iterator[str]:
        """Paths of the groups that hold coordinates; follows hard links only, each group once (loops end).

        By HDF5's own functions: h5py's look a name up some five times, which for 57,000 groups took half a minute.
        """
        address = h5py.h5o.get_info(node).addr
        if address in seen:
            return
        seen.add(address)
        if COORDINATES.encode() in node:
            yield path
            return
        links: list[bytes] = []
        node.links.iterate(
            lambda name, link: links.append(name) if link.type == h5py.h5l.TYPE_HARD else None, info=True
        )
        for name in links:
            child = h5py.h5o.open(node, name)
            if isinstance(child, h5py.h5g.GroupID):
                yield from self._walk(f"{path.rstrip('/')}/{name.decode()}", child, seen)

    def _describe(self, ordinal: int, path: str) -> RawGroup:
        try:
            return self._checked(ordinal, self.file[path])
        except BROKEN as error:
            raise self._damaged(path, error) from None

    def _checked(self, ordinal: int, node: h5py.Group) -> RawGroup:
        atoms = self._dataset(node, self.layout.atoms)
        coordinates = self._dataset(node, COORDINATES)
        if atoms.ndim != 1 or not atoms.shape[0]:
            raise self._wrong_shape(atoms, "(Na,) with at least one atom")
        shape = coordinates.shape
        if len(shape) != 3 or shape[1:] != (atoms.shape[0], 3):
            raise self._wrong_shape(coordinates, f"(Nc, {atoms.shape[0]}, 3)")
        for level in self.levels:
            for key in (*level.source.energy_keys, *([level.source.forces] if level.source.forces else [])):
                if key not in node:
                    raise self._missing(node, key, f", which level '{level.name}' needs")
        if ordinal == 0:
            self._warn_of_what_is_left_out(node)
            self._warn_of_single_precision(node)
        return RawGroup(ordinal, node.name, self._count(node), atoms.shape[0])

    def _warn_of_what_is_left_out(self, node: h5py.Group) -> None:
        if COORDINATES + HIGH_ENERGY in node and HIGH_ENERGY not in self.layout.suffixes:
            log.warning(
                "%s: high-energy conformations (%s) are left out; reader ani1 takes them with the option high_energy",
                self.path,
                COORDINATES + HIGH_ENERGY,
            )

    def _warn_of_single_precision(self, node: h5py.Group) -> None:
        for level in self.levels:
            for key in level.source.energy_keys:
                if self._dataset(node, key).dtype == np.float32:
                    log.warning(
                        "%s: '%s' is float32, so energies of hundreds of Ha are known to some 1e-5 Ha only",
                        self.path,
                        key,
                    )

    def _count(self, node: h5py.Group) -> int:
        return sum(self._length(node, suffix) for suffix in self.layout.suffixes)

    def _length(self, node: h5py.Group, suffix: str) -> int:
        key = COORDINATES + suffix
        return self._dataset(node, key).shape[0] if not suffix or key in node else 0

    # --------------------------------------------------------------------------------------------- reading rows

    def _spans(self, node, group: RawGroup, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """(suffix, first, last) of the pieces that rows [start, stop) of a group are made of."""
        if len(self.layout.suffixes) == 1:
            yield self.layout.suffixes[0], start, stop
            return
        offset = 0
        for suffix in self.layout.suffixes:
            length = self._length(node, suffix)
            first, last = max(start - offset, 0), min(stop - offset, length)
            if first < last:
                yield suffix, first, last
            offset += length

    def _read_part(self, node, numbers: np.ndarray, suffix: str, start: int, stop: int) -> Rows:
        N, R, unit = len(numbers), stop - start, ENERGY_UNITS[self.layout.energy_unit]
        with_forces = [level.source.forces for level in self.levels if level.source.forces]
        length = self._length(node, suffix)
        energy = np.zeros((R, len(self.levels)), dtype=np.float64)
        for column, level in enumerate(self.levels):
            for key in level.source.energy_keys:
                energy[:, column] += self._rows(node, key + suffix, (length,), start, stop)
        forces = np.empty((R, len(with_forces), N, 3), dtype=np.float32)
        for plane, key in enumerate(with_forces):
            raw = self._rows(node, key + suffix, (length, N, 3), start, stop)
            # in float64: one rounding, not two
            with np.errstate(over="ignore"):
                forces[:, plane] = raw.astype(np.float64) * (unit * self.layout.force_sign)
        return Rows(
            numbers=numbers,
            pos=self._rows(node, COORDINATES + suffix, (length, N, 3), start, stop).astype(np.float32),
            energy=energy * unit,
            forces=forces,
            molecule=self._molecules(node, numbers, length, start, stop),
        )

    def _rows(self, node, key: str, shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        data = self._dataset(node, key)
        found = data.shape
        if found not in (shape, (*shape, 1)):
            raise self._wrong_shape(data, str(shape))
        values = data[start:stop].reshape(stop - start, *shape[1:])
        if values.dtype.kind != "f" or values.dtype.itemsize < 4:
            raise DataError(
                f"{self.path}: '{key}' of group {node.name} has the type {values.dtype}, expected float32 or float64: "
                "convert the file"
            )
        return values

    def _numbers(self, node, group: RawGroup) -> np.ndarray:
        values = self._dataset(node, self.layout.atoms)[()]
        if values.dtype.kind in "iu":
            return values.astype(np.int64)
        if values.dtype.kind in "SO":
            return np.array([ATOMIC_NUMBERS.get(_text(symbol), 0) for symbol in values], dtype=np.int64)
        raise DataError(
            f"{self.path}: '{self.layout.atoms}' of group {group.path} has the type {values.dtype}, "
            "expected atomic numbers or element symbols: convert the file"
        )

    def _molecules(self, node, numbers, length: int, start: int, stop: int) -> np.ndarray:
        name = formula(np.where((numbers > 0) & (numbers < 119), numbers, 0))
        if self.layout.smiles is None or "smiles" not in node:
            return np.full(stop - start, name)
        data = self._dataset(node, "smiles")
        if self.layout.smiles == "letters":
            letters = "".join(_text(letter) for letter in data[()].reshape(-1))
            return np.full(stop - start, letters or name)
        if data.shape != (length,):
            raise self._wrong_shape(data, str((length,)))
        raw = data[start:stop]
        # few distinct strings: decode each once
        distinct, where = np.unique(raw, return_inverse=True)
        return np.array([_text(smiles) or name for smiles in distinct])[where]

    # -------------------------------------------------------------------------------------------------- trouble

    def _dataset(self, node, key: str) -> h5py.Dataset:
        try:
            # half the time of node[key], and this is what reading small groups consists of
            return h5py.Dataset(h5py.h5d.open(node.id, key.encode()))
        except (KeyError, ValueError, TypeError):
            if key not in node:
                raise self._missing(node, key) from None
            if isinstance(node[key], h5py.Group):
                raise DataError(f"{self.path}: '{key}' of group {node.name} is a group, expected an array") from None
            raise

    def _missing(self, node, key: str, why: str = "") -> DataError:
        return DataError(
            f"{self.path}: group {node.name} lacks the key '{key}'{why}{suggest(key, sorted(node))}: name the keys of "
            "the file in 'levels', or take the reader of its layout"
        )

    def _wrong_shape(self, data: h5py.Dataset, expected: str) -> DataError:
        group, _, key = data.name.rpartition("/")
        return DataError(
            f"{self.path}: '{key}' of group {group} has the shape {data.shape}, expected {expected}: "
            "mend the file, or take the reader of its layout"
        )

    def _damaged(self, group: str, error: Exception) -> DataError:
        text = str(error).replace("\n", " ")
        return DataError(f"{self.path}: cannot read group {group} ({text}): damaged or truncated, fetch the file again")


ROW_FIELDS = ("pos", "energy", "forces", "molecule")


def _text(value) -> str:
    return (value.decode("utf-8", errors="replace") if isinstance(value, bytes) else str(value)).strip("\0 ")


def _open(path: Path) -> h5py.File:
    try:
        with open(path, "rb") as file:
            head = file.read(len(SIGNATURE))
    except OSError as error:
        raise DataError(f"cannot read the source {path}: {error.strerror}") from None
    if not head:
        raise DataError(f"the source {path} is empty; fetch it again")
    try:
        return _with_small_cache(h5py.File(path, "r"))
    except OSError as error:
        if "unable to lock" in str(error):
            raise DataError(f"the source {path} is open for writing elsewhere; close it there first") from None
        what = "a truncated or damaged HDF5 file" if head == SIGNATURE else "no HDF5 file"
        raise DataError(f"the source {path} is {what}; fetch it again") from None


def _with_small_cache(file: h5py.File) -> h5py.File:
    """HDF5 keeps metadata of visited groups, up to 32 MB, and we visit each group once.

    What is looked up every time must fit: with 1 MB, less than the names of ANI-1's 48,000 molecules of eight heavy
    atoms, each lookup took ten times as long.
    """
    config = file.id.get_mdc_config()
    config.set_initial_size, config.initial_size = True, CACHE_BYTES
    config.min_size = config.max_size = CACHE_BYTES
    file.id.set_mdc_config(config)
    return file
