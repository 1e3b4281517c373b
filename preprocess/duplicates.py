"""Structures that stand in the sources more than once, within a file or across files: counted and listed, but kept.

One that stands in two splits is a leak: it is trained on and held out.
"""

import csv
import io
import json
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hpcmlip.data.store import SPLITS
from hpcmlip.preprocess.job import Job
from hpcmlip.preprocess.scan import LEFT_OUT, Piece, arrays_path, receipt_path

MOST_LISTED = 100_000
COLUMNS = ("file", "group", "row", "split")

Place = tuple[str, str, int, str]
"""Values of `COLUMNS`."""


@dataclass(frozen=True)
class Duplicates:
    """Structures that repeat an earlier one."""

    structures: int
    across_splits: int
    """Those that stand in another split than the first of their kind."""
    listed: tuple[tuple[Place, Place], ...]
    """A structure and the first of its kind; at most `MOST_LISTED`, smaller structures first."""

    def as_csv(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*COLUMNS, *(f"first_{name}" for name in COLUMNS)])
        writer.writerows([*again, *first] for again, first in self.listed)
        return text.getvalue().encode()


def find(job: Job, num_units: int) -> Duplicates:
    """Equal fingerprints among the kept rows of all units, atom count by atom count (memory)."""
    holders: dict[int, list[int]] = {}
    for unit in range(num_units):
        for num_atoms in {num_atoms for num_atoms, *_ in _receipt(job, unit)["counts"]}:
            holders.setdefault(num_atoms, []).append(unit)
    structures, across, listed, places = 0, 0, [], _Places(job)
    for num_atoms, units in sorted(holders.items()):
        again, first = _pairs(job, num_atoms, units)
        structures += len(again)
        across += int((again[:, 2] != first[:, 2]).sum())
        for a, b in zip(again[: MOST_LISTED - len(listed)], first, strict=False):
            listed.append((places.find(num_atoms, *a.tolist()), places.find(num_atoms, *b.tolist())))
    return Duplicates(structures, across, tuple(listed))


def _pairs(job: Job, num_atoms: int, units: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """([D, 3], [D, 3]) unit, index in it and split of each structure that repeats one, and of the first of its kind."""
    keys = np.concatenate([_columns(job, unit, num_atoms, "fingerprint")[0] for unit in units])
    keys.sort()
    repeated = np.unique(keys[1:][keys[1:] == keys[:-1]])
    if not len(repeated):
        return np.empty((0, 3), int), np.empty((0, 3), int)
    found, where = [], []
    for unit in units:
        key, index, split = _columns(job, unit, num_atoms, "fingerprint", "index", "split")
        here = np.isin(key, repeated)
        found.append(key[here])
        where.append(np.column_stack([np.full(here.sum(), unit), index[here], split[here]]))
    key, place = np.concatenate(found), np.concatenate(where)
    order = np.argsort(key, kind="stable")
    is_first = np.concatenate([[True], key[order][1:] != key[order][:-1]])
    first = order[is_first][np.cumsum(is_first) - 1]
    again = np.argsort(order[~is_first])
    return place[order[~is_first][again]], place[first[~is_first][again]]


def _columns(job: Job, unit: int, num_atoms: int, *names: str) -> list[np.ndarray]:
    """Of the kept rows of a unit; `index` is their position among all of that atom count."""
    with np.load(arrays_path(job, unit), allow_pickle=False) as arrays:
        kept = np.flatnonzero(arrays[f"n{num_atoms}_split"] != LEFT_OUT)
        return [kept if name == "index" else arrays[f"n{num_atoms}_{name}"][kept] for name in names]


class _Places:
    """Where rows of units come from; what was read last stays at hand."""

    def __init__(self, job: Job):
        self._job = job
        self._origin = lru_cache(maxsize=8)(self._read_origin)
        self._pieces = lru_cache(maxsize=8)(self._read_pieces)

    def find(self, num_atoms: int, unit: int, index: int, split: int) -> Place:
        piece, row = (values[index] for values in self._origin(unit, num_atoms))
        source, group = self._pieces(unit)[piece]
        return self._job.sources[source].name, group, int(row), SPLITS[split]

    def _read_origin(self, unit: int, num_atoms: int) -> tuple[np.ndarray, np.ndarray]:
        with np.load(arrays_path(self._job, unit), allow_pickle=False) as arrays:
            return arrays[f"n{num_atoms}_piece"], arrays[f"n{num_atoms}_row"]

    def _read_pieces(self, unit: int) -> list[tuple[int, str]]:
        pieces = [Piece.from_json(values) for values in _receipt(self._job, unit)["pieces"]]
        return [(piece.source, piece.group.path) for piece in pieces]


def _receipt(job: Job, unit: int) -> dict:
    return json.loads(receipt_path(job, unit).read_bytes())
