"""From the counts of the scan to groups, chunks, shards and the tasks that write them. Pure.

Rows of a group are sorted by (split, labels, source order). A shard holds whole chunks, a task writes one shard of one
group. The same counts give the same store.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from hpcmlip.data.store import SPLITS, GroupMeta, Segment
from hpcmlip.preprocess import arrays
from hpcmlip.preprocess.job import Job
from hpcmlip.preprocess.scan import Scanned

CHUNK_BYTES = 1 << 20
"""Of a chunk of all arrays together, before compression."""
SHARD_BYTES = 8 << 20
"""Most of a shard of all arrays together, before compression. A worker holds a shard about three times over."""
MIN_SHARDS = 8
"""So that a small data set keeps some workers busy too."""


@dataclass(frozen=True)
class Pick:
    """Rows [first, last) among a unit's rows of that atom count, split and labels go to row `target` of the shard."""

    unit: int
    split: int
    labels: int
    first: int
    last: int
    target: int


@dataclass(frozen=True)
class WriteTask:
    job: Job
    group: GroupMeta
    shard: int
    periodic: bool
    """Does the store hold periodic structures?"""
    picks: tuple[Pick, ...]

    @property
    def rows(self) -> int:
        return sum(pick.last - pick.first for pick in self.picks)

    @property
    def cost(self) -> int:
        return self.rows

    @property
    def receipt(self) -> str:
        return f"write/{self.group.path}_{self.shard:05d}.json"


def row_bytes(num_atoms: int, num_levels: int, num_force_levels: int, *, periodic: bool) -> int:
    """Bytes of a structure in the store before compression."""
    specs = arrays.specs(num_atoms, num_levels, num_force_levels, periodic=periodic)
    return sum(np.dtype(spec.dtype).itemsize * math.prod(spec.tail) for spec in specs)


def groups(job: Job, scanned: Scanned) -> tuple[GroupMeta, ...]:
    """The groups of the store, by atom count."""
    totals: dict[int, dict[tuple[int, int], int]] = defaultdict(lambda: defaultdict(int))
    for counts in scanned.counts:
        for (num_atoms, split, labels), count in counts.items():
            totals[num_atoms][split, labels] += count
    sizes = {N: row_bytes(N, len(job.levels), len(job.force_levels), periodic=scanned.periodic) for N in totals}
    everything = sum(sum(parts.values()) * sizes[N] for N, parts in totals.items())
    shard_bytes = min(SHARD_BYTES, max(everything // MIN_SHARDS, CHUNK_BYTES))
    return tuple(_group(N, totals[N], sizes[N], shard_bytes) for N in sorted(totals))


def _group(num_atoms: int, parts: dict[tuple[int, int], int], size: int, shard_bytes: int) -> GroupMeta:
    segments, start = [], 0
    for (split, labels), count in sorted(parts.items()):
        segments.append(Segment(SPLITS[split], labels, start, start + count))
        start += count
    chunks = _ceil(start * size, CHUNK_BYTES)
    rows_per_chunk = _ceil(start, chunks)
    shards = _ceil(start * size, shard_bytes)
    chunks_per_shard = _ceil(_ceil(start, rows_per_chunk), shards)
    return GroupMeta(num_atoms, start, rows_per_chunk, rows_per_chunk * chunks_per_shard, tuple(segments))


def tasks(job: Job, scanned: Scanned, metas: tuple[GroupMeta, ...]) -> list[WriteTask]:
    """One task a shard, the largest first."""
    found = []
    for group in metas:
        runs = _runs(group, scanned)
        for shard in range(_ceil(group.rows, group.rows_per_shard)):
            start = shard * group.rows_per_shard
            stop = min(start + group.rows_per_shard, group.rows)
            found.append(WriteTask(job, group, shard, scanned.periodic, _picks(runs, start, stop)))
    return sorted(found, key=lambda task: (-task.rows * task.group.num_atoms, task.group.num_atoms, task.shard))


def _runs(group: GroupMeta, scanned: Scanned) -> list[tuple[int, Pick]]:
    """(first row in the group, rows of one unit that stand there), ascending."""
    runs = []
    for segment in group.segments:
        key = (group.num_atoms, SPLITS.index(segment.split), segment.labels)
        start = segment.start
        for unit, counts in enumerate(scanned.counts):
            if count := counts.get(key, 0):
                runs.append((start, Pick(unit, key[1], key[2], 0, count, 0)))
                start += count
    return runs


def _picks(runs: list[tuple[int, Pick]], start: int, stop: int) -> tuple[Pick, ...]:
    picks = []
    for at, run in runs:
        first, last = max(start - at, 0), min(stop - at, run.last)
        if first < last:
            picks.append(Pick(run.unit, run.split, run.labels, first, last, at + first - start))
    return tuple(picks)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
