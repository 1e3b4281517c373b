"""First pass: every row is read once and judged. What the second pass must know of it is kept in small files.

A unit is a run of row ranges (pieces) of some tens of thousands of rows; its result is `scan/00012.npz` with, for each
atom count, the row's split, label mask, molecule and fingerprint, and `scan/00012.json`, the receipt, written last.
"""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from hpcmlip.data import splits
from hpcmlip.data.store import SPLITS
from hpcmlip.preprocess import consistency, fingerprints
from hpcmlip.preprocess.checks import Verdict, judge
from hpcmlip.preprocess.files import digest, matches, write_whole
from hpcmlip.preprocess.job import Job
from hpcmlip.preprocess.readers import RawGroup, Rows
from hpcmlip.units import formula

UNIT_BYTES = 16 << 20
PIECE_BYTES = 1 << 20
MIN_UNITS = 16
LEFT_OUT = 255
"""In place of a split: the row is bad, or carries none of the labels."""


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a group of a source."""

    source: int
    group: RawGroup
    start: int
    stop: int

    def as_json(self) -> list:
        return [self.source, list(astuple(self.group)), self.start, self.stop]

    @staticmethod
    def from_json(values: list) -> "Piece":
        return Piece(values[0], RawGroup(*values[1]), values[2], values[3])


@dataclass(frozen=True)
class ScanTask:
    job: Job
    unit: int
    pieces: tuple[Piece, ...]

    @property
    def cost(self) -> int:
        """Rows; progress is counted in them."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def tasks(job: Job, groups: list[list[RawGroup]]) -> list[ScanTask]:
    """Units over the groups of all sources, in source order."""
    L, Lf = len(job.levels), len(job.force_levels)

    def row_bytes(group: RawGroup) -> int:
        return 12 * group.num_atoms * (1 + Lf) + 8 * L

    total = sum(group.rows * row_bytes(group) for listing in groups for group in listing)
    budget = min(UNIT_BYTES, max(total // MIN_UNITS, 1))
    units, current, filled = [], [], 0
    for piece in _pieces(groups, row_bytes):
        current.append(piece)
        filled += (piece.stop - piece.start) * row_bytes(piece.group)
        if filled >= budget:
            units.append(tuple(current))
            current, filled = [], 0
    if current:
        units.append(tuple(current))
    return [ScanTask(job, i, pieces) for i, pieces in enumerate(units)]


def _pieces(groups: list[list[RawGroup]], row_bytes) -> Iterator[Piece]:
    for source, listing in enumerate(groups):
        for group in listing:
            step = max(PIECE_BYTES // row_bytes(group), 1)
            for start in range(0, group.rows, step):
                yield Piece(source, group, start, min(start + step, group.rows))


def receipt_path(job: Job, unit: int) -> Path:
    return job.work / "scan" / f"{unit:05d}.json"


def arrays_path(job: Job, unit: int) -> Path:
    return job.work / "scan" / f"{unit:05d}.npz"


def finished(task: ScanTask) -> int | None:
    """Number of bad rows of a unit that is done, its files as they were written; None if it is not."""
    try:
        receipt = json.loads(receipt_path(task.job, task.unit).read_bytes())
    except (OSError, ValueError):
        return None
    return len(receipt["bad"]) if matches(arrays_path(task.job, task.unit), receipt["arrays"]) else None


def run(task: ScanTask) -> int:
    """Scan a unit; returns the number of its bad rows."""
    if (known := finished(task)) is not None:
        return known
    job, columns, keys = task.job, {}, {}
    bad: list[list] = []
    periodic = False
    meter = consistency.Meter(job)
    opened: dict = {}
    try:
        for number, piece in enumerate(task.pieces):
            if piece.source not in opened:
                opened[piece.source] = job.open(piece.source)
            rows = opened[piece.source].read(piece.group, piece.start, piece.stop)
            verdict = judge(rows, job)
            part = _scan_piece(job, piece, rows, verdict, keys, bad)
            part["row"] = np.arange(piece.start, piece.stop, dtype=np.uint32)
            part["piece"] = np.full(len(part["row"]), number, dtype=np.uint32)
            for name, values in part.items():
                columns.setdefault(piece.group.num_atoms, {}).setdefault(name, []).append(values)
            kept = part["split"] != LEFT_OUT
            periodic = periodic or (rows.pbc is not None and bool(rows.pbc[kept].any()))
            meter.add(rows, kept, verdict.bonds)
    finally:
        for file in opened.values():
            file.close()
    _write(task, columns, keys, {"periodic": periodic, "bad": bad, "sums": meter.sums.as_json()})
    return len(bad)


def _scan_piece(
    job: Job, piece: Piece, rows: Rows, verdict: Verdict, keys: dict[str, int], bad: list[list]
) -> dict[str, np.ndarray]:
    """split, labels, molecule (index into this unit's `keys`) and fingerprint of each row; `bad` gets the bad ones."""
    split = _split(job, piece, rows)
    split[verdict.labels == 0] = LEFT_OUT
    for row, (reason, value) in sorted(verdict.bad.items()):
        split[row] = LEFT_OUT
        bad.append([job.sources[piece.source].name, piece.group.path, piece.start + row, reason, value])
    kept = split != LEFT_OUT
    molecule = np.zeros(len(split), dtype=np.uint32)
    distinct, where = np.unique(rows.molecule[kept], return_inverse=True)
    molecule[kept] = np.array([keys.setdefault(str(key), len(keys)) for key in distinct], dtype=np.uint32)[where]
    found = {"split": split, "labels": verdict.labels, "molecule": molecule}
    return found | {"fingerprint": fingerprints.of(rows)}


def _split(job: Job, piece: Piece, rows: Rows) -> np.ndarray:
    config = job.config.split
    if config.by == "structure":
        return splits.of_rows(piece.group.path, np.arange(piece.start, piece.stop), config.fractions, config.seed)
    if config.by == "formula":
        known = np.where((rows.numbers > 0) & (rows.numbers < 119), rows.numbers, 0)
        return splits.of_keys(np.full(len(rows.pos), formula(known)), config.fractions, config.seed)
    return splits.of_keys(rows.molecule, config.fractions, config.seed)


def _write(task: ScanTask, columns: dict, keys: dict[str, int], facts: dict) -> None:
    """Arrays and receipt; `facts` join the receipt."""
    arrays = {"keys": np.array(list(keys), dtype=np.str_)}
    counts: list[list] = []
    for num_atoms, parts in sorted(columns.items()):
        joined = {name: np.concatenate(values) for name, values in parts.items()}
        arrays |= {f"n{num_atoms}_{name}": values for name, values in joined.items()}
        kept = joined["split"] != LEFT_OUT
        found = Counter(zip(joined["split"][kept].tolist(), joined["labels"][kept].tolist(), strict=True))
        counts += [[num_atoms, split, labels, count] for (split, labels), count in sorted(found.items())]
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path = arrays_path(task.job, task.unit)
    write_whole(path, buffer.getvalue())
    receipt = {
        "arrays": {"size": len(buffer.getvalue()), "sha256": digest(path)},
        "pieces": [piece.as_json() for piece in task.pieces],
        "rows": task.cost,
        "counts": counts,
        **facts,
    }
    write_whole(receipt_path(task.job, task.unit), json.dumps(receipt).encode())


@dataclass(frozen=True)
class Scanned:
    """What the receipts of all units add up to."""

    rows: int
    counts: tuple[dict[tuple[int, int, int], int], ...]
    """Per unit: (atom count, split, labels) -> rows."""
    molecules: tuple[str, ...]
    """Keys of the molecules of the kept rows, sorted."""
    num_bad: int
    periodic: bool
    """Is any kept structure?"""
    sums: consistency.Sums

    @property
    def num_kept(self) -> int:
        return sum(sum(counts.values()) for counts in self.counts)

    def split_counts(self) -> dict[str, int]:
        """Rows of each split."""
        totals = Counter()
        for counts in self.counts:
            for (_, split, _), count in counts.items():
                totals[SPLITS[split]] += count
        return {name: totals[name] for name in SPLITS}


def gather(job: Job, num_units: int) -> Scanned:
    """Read the receipts of all units."""
    rows, num_bad, periodic, counts, keys = 0, 0, False, [], set()
    sums = consistency.Sums.zeros(len(job.levels), len(job.elements))
    for unit in range(num_units):
        receipt = json.loads(receipt_path(job, unit).read_bytes())
        rows += receipt["rows"]
        num_bad += len(receipt["bad"])
        periodic = periodic or receipt["periodic"]
        counts.append({tuple(key): count for *key, count in receipt["counts"]})
        sums += consistency.Sums.from_json(receipt["sums"])
        with np.load(arrays_path(job, unit), allow_pickle=False) as arrays:
            keys.update(arrays["keys"].tolist())
    return Scanned(rows, tuple(counts), tuple(sorted(keys)), num_bad, periodic, sums)


def quarantine(job: Job, units: Iterable[int]) -> Iterator[list]:
    """[file, group, row, reason, value] of each bad row of these units, in source order."""
    for unit in units:
        yield from json.loads(receipt_path(job, unit).read_bytes())["bad"]
