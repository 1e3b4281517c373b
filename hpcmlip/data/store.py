"""The store: a zarr v3 group per atom count, one metadata read to open, its counts enough for a plan.

Layout (R rows of a group, N atoms, L levels, Lf levels that have forces anywhere):

    zarr.json                   attributes["hpcmlip"] = Meta as JSON; attributes["hpcmlip_duplicates"] = how many
                                structures repeat another one, how many of them in another split; consolidated metadata
    manifest.json               every file of the store with size and sha256, and the digest of them all
    quarantine.csv, duplicates.csv   conformations that were left out, and such that repeat an earlier one
    molecules       (M, W) u1   key of each molecule (SMILES or formula) as UTF-8 bytes, filled up with 0
    n014/z          (R, N) u1   atomic numbers
    n014/pos        (R, N, 3) f4  Å
    n014/adjacency  (R, ceil(N*N/8)) u1   bit i*N+j, most significant first: dist(i, j) < cutoff, i != j; N <= 64 only;
                                absent from a store with periodic structures
    n014/cell       (R, 3, 3) f8  Å, rows are lattice vectors      (these two only in a store with periodic structures)
    n014/pbc        (R, 3) bool   along which of them a structure repeats; nowhere: a molecule
    n014/energy     (R, L) f8   eV, totals; NaN: no label
    n014/forces     (R, Lf, N, 3) f4  eV/Å; NaN: no label; absent where no level has forces
    n014/molecule   (R) u4      index into `molecules`
    n014/source     (R, 3) u4   index into Meta.sources, ordinal of the group in that file (by path), row in it

Rows of a group are sorted by (split, labels, source), so that a run reads only chunks that hold labels it trains on.
`labels` of a row is a bit mask: bit 2l energy of level l, bit 2l+1 forces of level l.
"""

import hashlib
import json
import stat
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import zarr
from zarr.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from hpcmlip.errors import DataError

SCHEMA = 2
MOLECULES_SCHEMA = 1
"""Of a store without periodic structures, which is what it was before there were any."""
SPLITS = ("train", "val", "test")
METADATA, MANIFEST = "zarr.json", "manifest.json"
QUARANTINE, DUPLICATES = "quarantine.csv", "duplicates.csv"
DUPLICATES_ATTRIBUTE = "hpcmlip_duplicates"


@dataclass(frozen=True)
class Level:
    """One level of theory as the store holds it."""

    name: str
    method: str
    basis: str
    has_forces: bool
    atomic_energies: dict[str, float] | None
    """Isolated atoms, symbol -> eV; None if unknown."""


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a group that share split and labels."""

    split: str
    labels: int
    start: int
    stop: int


@dataclass(frozen=True)
class GroupMeta:
    """The structures of one atom count."""

    num_atoms: int
    rows: int
    rows_per_chunk: int
    rows_per_shard: int
    segments: tuple[Segment, ...]

    @property
    def path(self) -> str:
        return f"n{self.num_atoms:03d}"


@dataclass(frozen=True)
class Source:
    """A raw file that went in."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Offsets:
    """Normal equations of composition against energy over the training split of one level, after subtraction of the
    isolated-atom energies where those are known (float64 eV; additive over stores)."""

    count: int
    ata: tuple[tuple[float, ...], ...]
    """[E, E] sum of n nᵀ, n the element counts of a structure."""
    atb: tuple[float, ...]
    """[E] sum of n·energy."""
    btb: float
    """Sum of energy²."""


@dataclass(frozen=True)
class Meta:
    """All that a plan, a model and a reader of the store need to know without touching an array."""

    schema: int
    name: str
    cutoff: float
    elements: tuple[int, ...]
    levels: tuple[Level, ...]
    offsets: tuple[Offsets, ...]
    groups: tuple[GroupMeta, ...]
    sources: tuple[Source, ...]
    split: dict
    """by, fractions, seed."""
    num_molecules: int
    quarantined: int
    periodic: bool = False
    """Are there periodic structures, hence `cell` and `pbc` everywhere?"""

    @property
    def force_levels(self) -> tuple[int, ...]:
        """Level index of each plane of the `forces` arrays."""
        return tuple(i for i, level in enumerate(self.levels) if level.has_forces)

    @property
    def num_structures(self) -> int:
        return sum(group.rows for group in self.groups)

    def level_index(self, name: str) -> int:
        return [level.name for level in self.levels].index(name)

    def as_json(self) -> dict:
        values = asdict(self)
        if not self.periodic:
            del values["periodic"]  # unknown to schema 1
        return values

    @staticmethod
    def from_json(values: dict) -> "Meta":
        def groups():
            for group in values["groups"]:
                segments = tuple(Segment(**segment) for segment in group["segments"])
                yield GroupMeta(**(group | {"segments": segments}))

        return Meta(
            **(
                values
                | {
                    "elements": tuple(values["elements"]),
                    "levels": tuple(Level(**level) for level in values["levels"]),
                    "offsets": tuple(
                        Offsets(o["count"], tuple(map(tuple, o["ata"])), tuple(o["atb"]), o["btb"])
                        for o in values["offsets"]
                    ),
                    "groups": tuple(groups()),
                    "sources": tuple(Source(**source) for source in values["sources"]),
                }
            )
        )


def energy_bit(level: int) -> int:
    """Bit of a label mask: the energy of level `level` is there."""
    return 1 << (2 * level)


def forces_bit(level: int) -> int:
    """Bit of a label mask: the forces of level `level` are there."""
    return 1 << (2 * level + 1)


@dataclass(frozen=True)
class Store:
    """An opened store; cheap to open, arrays are opened on first use."""

    path: Path
    meta: Meta
    digest: str
    """sha256 over the manifest: the identity of the data."""
    files: dict[str, dict] = field(compare=False, repr=False)
    """Manifest entries: relative path -> {"size", "sha256"}."""
    metadata: bytes = field(compare=False, repr=False)
    """Of the root, as the manifest knows it."""

    @cached_property
    def root(self) -> zarr.Group:
        try:
            folder = _Folder(self.path, self.metadata)
            return zarr.open_group(folder, mode="r", zarr_format=3, use_consolidated=True)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.path} is no hpcmlip store: zarr cannot read its metadata ({error})") from None

    def array(self, group: GroupMeta, name: str) -> zarr.Array:
        """Array `name` of a group; raises DataError if the store lacks it, or holds something else there."""
        try:
            array = self.root[f"{group.path}/{name}"]
        except KeyError:
            raise DataError(
                f"store {self.path} lacks the array {group.path}/{name}; run 'hpcmlip verify {self.path}'"
            ) from None
        # consolidated metadata may hold zarr v2, among whose filters is pickle: reading a chunk would run code
        if not isinstance(array, zarr.Array) or array.metadata.zarr_format != 3:
            raise DataError(f"store {self.path}: {group.path}/{name} is no zarr v3 array, nothing of it is read")
        return array

    def read(self, group: GroupMeta, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of an array; raises DataError naming the place if a chunk is damaged or a file missing."""
        array = self.array(group, name)
        first, last = start // group.rows_per_shard, (stop - 1) // group.rows_per_shard
        for shard in range(first, last + 1):
            self._check_present(f"{group.path}/{name}/c/" + "/".join([str(shard)] + ["0"] * (array.ndim - 1)))
        try:
            return array[start:stop]
        except (ValueError, RuntimeError, OSError) as error:
            raise DataError(
                f"store {self.path}: rows {start} to {stop} of {group.path}/{name} are damaged ({error}); "
                f"run 'hpcmlip verify {self.path}', then shard again"
            ) from None

    @property
    def duplicates(self) -> dict[str, int] | None:
        """`structures` that repeat an earlier one, and `across_splits`, those of them in another split than the first;
        None of a store for which nobody counted."""
        return self.root.attrs.get(DUPLICATES_ATTRIBUTE)

    def _check_present(self, name: str) -> None:
        # zarr reads a missing or empty shard as fill values without a word
        try:
            found = (self.path / name).stat()
            size = found.st_size if stat.S_ISREG(found.st_mode) else None
        except OSError:
            size = None
        if name not in self.files or size != self.files[name]["size"]:
            found = "missing" if size is None else f"{size} bytes long"
            raise DataError(f"store {self.path}: {name} is {found}; run 'hpcmlip verify {self.path}', then shard again")


def molecules_of_splits(store: Store) -> np.ndarray:
    """[molecules, splits] bool: has a molecule structures in a split? Counted from the rows themselves."""
    seen = np.zeros((store.meta.num_molecules, len(SPLITS)), dtype=bool)
    for group in store.meta.groups:
        for segment in group.segments:
            step = group.rows_per_shard
            for start in range(segment.start, segment.stop, step):
                molecule = store.read(group, "molecule", start, min(start + step, segment.stop))
                seen[molecule, SPLITS.index(segment.split)] = True
    return seen


class _Folder(LocalStore):
    """A folder whose root metadata was read before: of many runs that begin together each reads it once."""

    def __init__(self, root: Path, metadata: bytes):
        super().__init__(root, read_only=True)
        self._metadata = metadata

    async def get(self, key, prototype=None, byte_range=None):
        if key == METADATA:
            return (prototype or default_buffer_prototype()).buffer.from_bytes(self._metadata)
        return await super().get(key, prototype, byte_range)


def read_manifest(path: Path) -> dict:
    """The manifest of a store; raises DataError if it is absent or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} has no readable {MANIFEST} ({error}): an unfinished or damaged store, shard it again"
        ) from None
    if not isinstance(manifest, dict) or manifest_digest(manifest.get("files", {})) != manifest.get("digest"):
        raise DataError(f"{path / MANIFEST} does not match its own digest: damaged, shard it again")
    return manifest


def manifest_digest(files: dict[str, dict]) -> str:
    """sha256 over the sorted file entries of a manifest."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def open_store(path: Path | str) -> Store:
    """Open a finished store. Raises DataError if it is absent, unfinished, no store of ours, or of a newer schema."""
    path = Path(path)
    if not path.is_dir():
        hint = (
            f"; {path}.partial is an unfinished one, run the same 'hpcmlip shard' again"
            if Path(f"{path}.partial").is_dir()
            else ""
        )
        raise DataError(f"there is no store at {path}{hint}")
    manifest = read_manifest(path)
    try:
        raw = (path / METADATA).read_bytes()
    except OSError as error:
        raise DataError(f"{path} is no hpcmlip store: cannot read zarr.json ({error.strerror})") from None
    if hashlib.sha256(raw).hexdigest() != manifest["files"].get(METADATA, {}).get("sha256"):
        raise DataError(f"{path / METADATA} does not match the manifest: damaged, shard it again")
    try:
        values = json.loads(raw)["attributes"]["hpcmlip"]
        if values["schema"] > SCHEMA:
            raise DataError(f"{path} has schema {values['schema']}, this hpcmlip reads up to {SCHEMA}: upgrade hpcmlip")
        return Store(path, Meta.from_json(values), manifest["digest"], manifest["files"], raw)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no hpcmlip store ({type(error).__name__} while reading zarr.json)") from None
