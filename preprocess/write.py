"""Second pass: one task gathers the rows of one shard and writes the shard files of all arrays of its group.

A shard file is encoded in memory, written under a temporary name, read back and compared, then renamed; the receipt
with the sizes and hashes of all files of the task comes last.
"""

import hashlib
import json
import os
from collections import defaultdict
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path

import numpy as np
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from hpcmlip.data import offsets
from hpcmlip.data.adjacency import pack
from hpcmlip.data.store import SPLITS, GroupMeta
from hpcmlip.errors import DataError
from hpcmlip.files import flush
from hpcmlip.preprocess import arrays
from hpcmlip.preprocess.files import matches, write_temporary, write_whole
from hpcmlip.preprocess.job import Job
from hpcmlip.preprocess.layout import WriteTask
from hpcmlip.preprocess.scan import Piece, arrays_path, receipt_path

GAP = 64
"""Rows read along although nobody wants them, rather than reading twice."""

Columns = dict[str, np.ndarray]


def run(task: WriteTask) -> int:
    """Write a shard; returns the number of bytes on disk."""
    path = task.job.work / task.receipt
    receipt = _finished(task, path)
    if receipt is None:
        columns = _gather(task)
        parts = _normal_equations(task, columns)
        files = _write(task, columns)
        receipt = {"files": files, "offsets": parts}
        write_whole(path, json.dumps(receipt).encode())
    return sum(file["size"] for file in receipt["files"].values())


def _finished(task: WriteTask, path: Path) -> dict | None:
    try:
        receipt = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    whole = all(matches(task.job.store / name, file) for name, file in receipt["files"].items())
    return receipt if whole else None


# ------------------------------------------------------------------------------------------------- gathering rows


def _gather(task: WriteTask) -> Columns:
    """The rows of a shard in their final order."""
    job, N, R = task.job, task.group.num_atoms, task.rows
    specs = arrays.specs(N, len(job.levels), len(job.force_levels), periodic=task.periodic)
    columns = {spec.name: np.zeros((R, *spec.tail), dtype=spec.dtype) for spec in specs}
    for unit in sorted({pick.unit for pick in task.picks}):
        wanted = _wanted(task, unit)
        _gather_unit(job, unit, wanted, columns)
    if "adjacency" in columns:
        for start in range(0, R, task.group.rows_per_chunk):
            stop = start + task.group.rows_per_chunk
            columns["adjacency"][start:stop] = pack(columns["pos"][start:stop], job.config.cutoff)
    return columns


def _wanted(task: WriteTask, unit: int) -> dict[int, Columns]:
    """Of a unit: piece -> row in the group, target in the shard and molecule of each row that belongs to the shard."""
    N = task.group.num_atoms
    with np.load(arrays_path(task.job, unit), allow_pickle=False) as loaded:
        columns = {name: loaded[f"n{N}_{name}"] for name in ("split", "labels", "molecule", "row", "piece")}
        index = _molecule_index(task.job.work)
        to_global = np.array([index[key] for key in loaded["keys"].tolist()], dtype=np.uint32)
    found = defaultdict(lambda: defaultdict(list))
    for pick in (pick for pick in task.picks if pick.unit == unit):
        rows = np.flatnonzero((columns["split"] == pick.split) & (columns["labels"] == pick.labels))
        rows = rows[pick.first : pick.last]
        target = np.arange(pick.target, pick.target + len(rows))
        pieces = columns["piece"][rows]
        for piece in np.unique(pieces).tolist():
            here = pieces == piece
            found[piece]["row"].append(columns["row"][rows[here]])
            found[piece]["target"].append(target[here])
            found[piece]["molecule"].append(to_global[columns["molecule"][rows[here]]])
    return {
        piece: {name: np.concatenate(values) for name, values in parts.items()}
        for piece, parts in sorted(found.items())
    }


def _gather_unit(job: Job, unit: int, wanted: dict[int, Columns], columns: Columns) -> None:
    pieces = [Piece.from_json(values) for values in json.loads(receipt_path(job, unit).read_bytes())["pieces"]]
    opened: dict = {}
    try:
        for number, want in wanted.items():
            piece = pieces[number]
            if piece.source not in opened:
                opened[piece.source] = job.open(piece.source)
            _gather_piece(opened[piece.source], piece, want, columns)
    finally:
        for file in opened.values():
            file.close()


def _gather_piece(file, piece: Piece, want: Columns, columns: Columns) -> None:
    order = np.argsort(want["row"], kind="stable")
    row, target, molecule = want["row"][order].astype(np.int64), want["target"][order], want["molecule"][order]
    # few reads of long runs: each costs a fraction of a millisecond a key
    for run in np.split(np.arange(len(row)), np.flatnonzero(np.diff(row) > GAP) + 1):
        start, stop = int(row[run[0]]), int(row[run[-1]]) + 1
        rows = file.read(piece.group, start, stop)
        take, to = row[run] - start, target[run]
        columns["z"][to] = rows.numbers
        columns["pos"][to] = rows.pos[take]
        columns["energy"][to] = rows.energy[take]
        if "forces" in columns:
            columns["forces"][to] = rows.forces[take]
        if "cell" in columns and rows.cell is not None:
            columns["cell"][to], columns["pbc"][to] = rows.cell[take], rows.pbc[take]
        columns["molecule"][to] = molecule[run]
        columns["source"][to] = np.stack(
            [np.full(len(to), piece.source), np.full(len(to), piece.group.ordinal), row[run]], axis=1
        )


@lru_cache(maxsize=1)
def _molecule_index(work: Path) -> dict[str, int]:
    """Key of a molecule -> its index in the store."""
    return {key: i for i, key in enumerate(json.loads((work / "molecules.json").read_bytes()))}


def _normal_equations(task: WriteTask, columns: Columns) -> list[list]:
    """Per level: the fields of `Offsets` over the training rows of the shard."""
    train = np.zeros(task.rows, dtype=bool)
    for pick in task.picks:
        train[pick.target : pick.target + pick.last - pick.first] = pick.split == SPLITS.index("train")
    elements = task.job.elements
    counts = np.stack([(columns["z"][train] == z).sum(axis=1) for z in elements], axis=1).astype(np.float64)
    parts = []
    for i, level in enumerate(task.job.store_levels()):
        energy = columns["energy"][train, i] - counts @ offsets.isolated_energies(level, elements)
        parts.append(list(astuple(offsets.accumulate(counts, energy))))
    return parts


# ------------------------------------------------------------------------------------------------- writing shards


def _write(task: WriteTask, columns: Columns) -> dict[str, dict]:
    """Write the shard files of all arrays; returns their manifest entries."""
    job, group = task.job, task.group
    files, written = {}, []
    for spec in arrays.specs(group.num_atoms, len(job.levels), len(job.force_levels), periodic=task.periodic):
        name = f"{group.path}/{spec.name}/{spec.shard_key(task.shard)}"
        data = encode(columns.pop(spec.name), spec, group)
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        written.append((write_temporary(job.store / name, data), job.store / name))
    for temporary, path in written:
        # all are on their way to the disk by now, so the later ones hardly wait
        flush(temporary)
        os.replace(temporary, path)
    return files


def encode(values: np.ndarray, spec: arrays.ArraySpec, group: GroupMeta) -> bytes:
    """Shard file of up to `rows_per_shard` rows; decoded again and compared."""
    memory = MemoryStore()
    array = arrays.create(memory, spec.name, spec, group, len(values))
    array[:] = values
    for start in range(0, len(values), group.rows_per_chunk):
        part = slice(start, start + group.rows_per_chunk)
        if array[part].tobytes() != values[part].tobytes():
            raise DataError(
                f"{group.path}/{spec.name}: the codec gave back other values than it got; check the machine's memory"
            )
    key = f"{spec.name}/{spec.shard_key(0)}"
    return sync(memory.get(key, default_buffer_prototype())).to_bytes()
