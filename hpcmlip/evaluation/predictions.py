"""predictions.zarr: what was predicted for every structure, as zarr v3 with one group per atom count.

Rows are sorted by source, energies are totals in eV; the names of members and levels are attributes of the root.
R rows, N atoms, P members, L levels, Lf levels with forces:

    n014/z               (R, N) u1
    n014/source          (R, 3) u4   file, group, row, as in the store
    n014/energy_label    (R, L) f8   NaN: no label
    n014/energy_members  (R, P, L) f8
    n014/energy_mean     (R, L) f8
    n014/energy_std      (R, L) f8   over members (n - 1); NaN for one member
    n014/energy_baseline (R, L) f8   atomic energies of the first member: the composition alone
    n014/forces_label    (R, N, Lf, 3) f4  eV/Å
    n014/forces_mean     (R, N, Lf, 3) f4
    n014/forces_std      (R, N, Lf, 3) f4

Ranks never write to the same file: each appends its rows to raw files of its own (`Spill`), and rank 0 merges them
piece by piece. The result does not depend on the number of ranks but for rounding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import zarr

from hpcmlip.evaluation.sums import Result, std

DTYPES = {
    "z": "u1",
    "source": "u4",
    "energy_label": "f8",
    "energy_members": "f8",
    "energy_mean": "f8",
    "energy_std": "f8",
    "energy_baseline": "f8",
    "forces_label": "f4",
    "forces_mean": "f4",
    "forces_std": "f4",
}
CHUNK_BYTES = 2**20
SHARD_CHUNKS = 64


def rows_of(result: Result) -> dict[str, np.ndarray]:
    """The arrays of one block, by name, rows first."""
    return {
        "z": result.numbers,
        "source": result.source,
        "energy_label": result.energy_label,
        "energy_members": result.energy.swapaxes(0, 1),
        "energy_mean": result.energy.mean(0),
        "energy_std": std(result.energy),
        "energy_baseline": result.baseline,
        "forces_label": result.forces_label,
        "forces_mean": result.forces.mean(0),
        "forces_std": std(result.forces),
    }


@dataclass(frozen=True)
class Spill:
    """Raw files of one rank: `nNNN.NAME.<rank>`, rows of fixed shape one after another."""

    folder: Path
    rank: int

    def write(self, result: Result) -> None:
        """Append one block."""
        for name, values in rows_of(result).items():
            with (self.folder / f"n{result.numbers.shape[1]:03d}.{name}.{self.rank:05d}").open("ab") as file:
                file.write(np.ascontiguousarray(values, dtype=DTYPES[name]).tobytes())


@dataclass(frozen=True)
class Shapes:
    """What the raw files do not say."""

    num_members: int
    num_levels: int
    num_force_levels: int

    def row(self, name: str, num_atoms: int) -> tuple[int, ...]:
        """Shape of one row of an array."""
        if name == "z":
            return (num_atoms,)
        if name == "source":
            return (3,)
        if name == "energy_members":
            return (self.num_members, self.num_levels)
        return (self.num_levels,) if name.startswith("energy") else (num_atoms, self.num_force_levels, 3)


def merge(spill: Path, out: Path, shapes: Shapes, attributes: dict) -> int:
    """Write predictions.zarr from the raw files of all ranks; returns the number of structures."""
    count = 0
    root = zarr.open_group(out, mode="w-", zarr_format=3)
    root.attrs.update(attributes)
    for size in sorted({int(path.name[1:].split(".")[0]) for path in spill.iterdir()}):
        group = root.create_group(f"n{size:03d}")
        source = np.concatenate(_parts(spill, "source", size, shapes))
        order = np.lexsort(source.T[::-1])
        count += len(order)
        for name in DTYPES:
            if name.startswith("forces") and not shapes.num_force_levels:
                continue
            parts = _parts(spill, name, size, shapes)
            _write(group, name, parts, order)
    return count


def _parts(spill: Path, name: str, size: int, shapes: Shapes) -> list[np.ndarray]:
    """Rows of each rank, memory-mapped."""
    parts = []
    for path in sorted(spill.glob(f"n{size:03d}.{name}.*")):
        parts.append(np.memmap(path, dtype=DTYPES[name], mode="r").reshape(-1, *shapes.row(name, size)))
    return parts


def _write(group: zarr.Group, name: str, parts: Sequence[np.ndarray], order: np.ndarray) -> None:
    row = parts[0].shape[1:]
    per_chunk = int(max(1, min(len(order), CHUNK_BYTES // max(1, parts[0][0].nbytes))))
    per_shard = per_chunk * max(1, min(SHARD_CHUNKS, -(-len(order) // per_chunk)))
    array = group.create_array(
        name, shape=(len(order), *row), dtype=parts[0].dtype, chunks=(per_chunk, *row), shards=(per_shard, *row)
    )
    for start in range(0, len(order), per_shard):
        array[start : start + per_shard] = take(parts, order[start : start + per_shard])


def take(parts: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Rows of arrays that are thought of as laid end to end."""
    starts = np.cumsum([0, *map(len, parts)])
    which = np.searchsorted(starts, rows, side="right") - 1
    out = np.empty((len(rows), *parts[0].shape[1:]), parts[0].dtype)
    for i in np.unique(which):
        out[which == i] = parts[i][rows[which == i] - starts[i]]
    return out


def groups(path: Path) -> Iterator[tuple[int, zarr.Group]]:
    """(atom count, group) of a predictions.zarr, ascending."""
    root = zarr.open_group(path, mode="r", zarr_format=3, use_consolidated=False)
    for name in sorted(root.group_keys()):
        yield int(name[1:]), root[name]
