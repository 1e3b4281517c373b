"""Is a store what it was when it was written?

Every file is compared with the manifest, every chunk decoded, every stored graph recomputed.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hpcmlip.data import adjacency
from hpcmlip.data.store import MANIFEST, GroupMeta, Store, energy_bit, forces_bit, open_store, read_manifest
from hpcmlip.errors import DataError
from hpcmlip.lattice import lacks_volume


def check_files(path: Path) -> Iterator[str]:
    """Files that are missing, of another size or content, or not listed. Raises DataError without a manifest."""
    files = read_manifest(path)["files"]
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            yield f"{name}: missing"
        elif file.stat().st_size != expected["size"]:
            yield f"{name}: {file.stat().st_size} bytes, {expected['size']} were written"
        else:
            with open(file, "rb") as opened:
                if hashlib.file_digest(opened, "sha256").hexdigest() != expected["sha256"]:
                    yield f"{name}: content differs from what was written (sha256)"
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in files and name != MANIFEST:
            yield f"{name}: not part of the store"


def check_chunks(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(rows, what is wrong) of each chunk's range of rows in all arrays. Raises DataError if metadata is damaged."""
    store = open_store(path)
    for group in store.meta.groups:
        problems = list(_check_segments(group))
        for start in range(0, group.rows, group.rows_per_chunk):
            stop = min(start + group.rows_per_chunk, group.rows)
            problems += _check_rows(store, group, start, stop)
            yield stop - start, problems
            problems = []


def _check_segments(group: GroupMeta) -> Iterator[str]:
    edges = [0, *(segment.stop for segment in group.segments)]
    starts = [segment.start for segment in group.segments]
    if edges[:-1] != starts or edges[-1] != group.rows:
        yield f"{group.path}: its segments do not cover rows 0 to {group.rows} once each"


def _check_rows(store: Store, group: GroupMeta, start: int, stop: int) -> list[str]:
    where = f"rows {start} to {stop}"
    values, problems = {}, []
    for name in sorted(store.root[group.path].array_keys()):
        try:
            values[name] = store.read(group, name, start, stop)
        except DataError as error:
            problems.append(f"{group.path}/{name}: chunk of {where} is damaged ({_reason(error)})")
    problems += [f"{group.path}: {where}: {what}" for what in _contradictions(store, group, start, values)]
    return problems


def _reason(error: DataError) -> str:
    """The core of the store's message."""
    text = str(error).split(": ", 1)[-1]
    return text.split("; run ", 1)[0]


def _contradictions(store: Store, group: GroupMeta, start: int, values: dict[str, np.ndarray]) -> Iterator[str]:
    """Where the arrays of some rows contradict one another or the metadata."""
    meta = store.meta
    if "z" in values and not np.isin(values["z"], meta.elements).all():
        yield "z holds an element that the store does not list"
    if "pos" in values and not np.isfinite(values["pos"]).all():
        yield "pos is not finite"
    if "molecule" in values and values["molecule"].max(initial=0) >= meta.num_molecules:
        yield "molecule points past the list of molecules"
    if "source" in values and values["source"][:, 0].max(initial=0) >= len(meta.sources):
        yield "source names a file that the store does not list"
    if {"cell", "pbc"} <= values.keys():
        flat = lacks_volume(values["cell"], values["pbc"])
        if flat.any():
            yield f"cell of row {start + int(flat.argmax())} has no volume"
    if {"pos", "adjacency"} <= values.keys():
        differs = (adjacency.pack(values["pos"], meta.cutoff) != values["adjacency"]).any(axis=1)
        if differs.any():
            yield f"adjacency of row {start + int(differs.argmax())} is not that of its positions"
    if "energy" in values and ("forces" in values or not meta.force_levels):
        differs = _labels(store, values) != _expected_labels(group, start, len(values["energy"]))
        if differs.any():
            yield f"row {start + int(differs.argmax())} carries other labels than its segment says"


def _labels(store: Store, values: dict[str, np.ndarray]) -> np.ndarray:
    """[R] uint64 label mask of each row, from the labels themselves."""
    labels = np.zeros(len(values["energy"]), dtype=np.uint64)
    for level in range(len(store.meta.levels)):
        labels[np.isfinite(values["energy"][:, level])] |= np.uint64(energy_bit(level))
    for plane, level in enumerate(store.meta.force_levels):
        labels[np.isfinite(values["forces"][:, plane]).all(axis=(1, 2))] |= np.uint64(forces_bit(level))
    return labels


def _expected_labels(group: GroupMeta, start: int, rows: int) -> np.ndarray:
    expected = np.zeros(group.rows, dtype=np.uint64)
    for segment in group.segments:
        expected[segment.start : segment.stop] = segment.labels
    return expected[start : start + rows]
