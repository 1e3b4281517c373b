"""What a store holds (`show`) and whether it is still whole (`verify`)."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hpcmlip.data import verification
from hpcmlip.data.offsets import atomic_energies, isolated_energies, knows_isolated
from hpcmlip.data.store import SPLITS, Meta, Store, energy_bit, forces_bit, molecules_of_splits, open_store
from hpcmlip.errors import DataError
from hpcmlip.units import SYMBOLS


def label_counts(meta: Meta) -> dict[str, dict[str, dict[str, int]]]:
    """level -> "energy" | "forces" -> split -> labelled structures."""
    counts = {
        level.name: {name: dict.fromkeys(SPLITS, 0) for name in ("energy", "forces")[: 1 + level.has_forces]}
        for level in meta.levels
    }
    for group in meta.groups:
        for segment in group.segments:
            for i, level in enumerate(meta.levels):
                for name, bit in (("energy", energy_bit(i)), ("forces", forces_bit(i))):
                    if segment.labels & bit:
                        counts[level.name][name][segment.split] += segment.stop - segment.start
    return counts


def split_counts(meta: Meta) -> dict[str, int]:
    """split -> structures."""
    counts = dict.fromkeys(SPLITS, 0)
    for group in meta.groups:
        for segment in group.segments:
            counts[segment.split] += segment.stop - segment.start
    return counts


def fitted(meta: Meta, level: int) -> tuple[np.ndarray, float]:
    """([E] eV, RMS residual eV): atomic energies that fit the totals of a level best on its training split."""
    rest, rms = atomic_energies(meta.offsets[level])
    return isolated_energies(meta.levels[level], meta.elements) + rest, rms


def duplicates_text(store: Store) -> str:
    """How many structures repeat others, and whether held-out data leak thereby."""
    found = store.duplicates
    if found is None:
        return "not counted by the version that made this store"
    if not found["structures"]:
        return "0"
    leak = f"{found['across_splits']:,} of them in another split than the first of their kind: held-out data leak"
    return f"{found['structures']:,} structures repeat an earlier one" + (f", {leak}" if found["across_splits"] else "")


def split_text(structures: Mapping[str, int], molecules: Mapping[str, int]) -> str:
    """`train 867 (22 molecules), ...` of counts by split."""
    return ", ".join(f"{name} {count:,} ({molecules[name]:,} molecules)" for name, count in structures.items())


def wide_console() -> Console:
    """stdout; in a file or pipe, where there is no width to keep to, wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def level_table(meta: Meta) -> Table:
    """Per level: labels in each split, atomic energies fitted to the totals and what they leave."""
    table = Table(title="levels of theory, their labels and least-squares atomic energies", title_justify="left")
    table.add_column("level")
    table.add_column("labels")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for z in meta.elements:
        table.add_column(f"{SYMBOLS[z]} / eV", justify="right")
    table.add_column("residual RMS / eV", justify="right")
    table.add_column("isolated atoms")
    for i, (name, labels) in enumerate(label_counts(meta).items()):
        known = knows_isolated(meta.levels[i], meta.elements)
        squares = np.array(meta.offsets[i].ata)
        occurs = np.diag(squares) > 0
        if not known and np.linalg.matrix_rank(squares, hermitian=True) < occurs.sum():
            table.caption = "too few compositions to tell the elements apart: only the sum over a structure is fitted"
            table.caption_justify = "left"
        for prop, counts in labels.items():
            row = [name, prop, *(f"{counts[split]:,}" for split in SPLITS)]
            fit = _fit(meta, i, occurs | known) if prop == "energy" else []
            table.add_row(*row, *fit)
    return table


def _fit(meta: Meta, level: int, determined: np.ndarray) -> list[str]:
    """Cells of the fit of a level; empty for elements whose energy is not `determined` [E] bool."""
    energies, rms = fitted(meta, level)
    cells = [f"{energy:.3f}" if there else "" for energy, there in zip(energies, determined, strict=True)]
    known = knows_isolated(meta.levels[level], meta.elements)
    return [*cells, f"{rms:.3f}", "known" if known else "unknown"]


# ---------------------------------------------------------------------------------------------------------- inspect


def show(path: Path, as_json: bool = False) -> None:
    """Print what a store holds, as tables or as one JSON object. Raises DataError if it is no store."""
    store = open_store(path)
    facts = describe(store)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    console = wide_console()
    console.print(_overview(facts, duplicates_text(store)))
    console.print(_group_table(facts))
    console.print(level_table(store.meta))
    for source in facts["sources"]:
        console.print(f"source {source['name']}: {source['size']:,} bytes, sha256 {source['sha256']}", soft_wrap=True)


def describe(store: Store) -> dict:
    """All that `show` prints, as plain values."""
    meta = store.meta
    labels = label_counts(meta)
    levels = {}
    for i, level in enumerate(meta.levels):
        energies, rms = fitted(meta, i)
        levels[level.name] = {
            "method": level.method,
            "basis": level.basis,
            "labels": labels[level.name],
            "isolated_atoms_known": knows_isolated(level, meta.elements),
            "fitted_atomic_energies_ev": dict(zip((SYMBOLS[z] for z in meta.elements), energies.tolist(), strict=True)),
            "residual_rms_ev": None if np.isnan(rms) else rms,
        }
    molecules = molecules_of_splits(store)
    return {
        "path": str(store.path),
        "name": meta.name,
        "schema": meta.schema,
        "digest": store.digest,
        "structures": meta.num_structures,
        "atoms": sum(group.rows * group.num_atoms for group in meta.groups),
        "molecules": meta.num_molecules,
        "quarantined": meta.quarantined,
        "duplicates": store.duplicates,
        "elements": [SYMBOLS[z] for z in meta.elements],
        "cutoff": meta.cutoff,
        "periodic": meta.periodic,
        "bytes": sum(file["size"] for file in store.files.values()),
        "files": len(store.files),
        "split": {
            **meta.split,
            "structures": split_counts(meta),
            "molecules": dict(zip(SPLITS, molecules.sum(axis=0).tolist(), strict=True)),
            "molecules_in_two_splits": int((molecules.sum(axis=1) > 1).sum()),
        },
        "levels": levels,
        "groups": [dataclasses.asdict(group) for group in meta.groups],
        "sources": [dataclasses.asdict(source) for source in meta.sources],
    }


def _overview(facts: dict, duplicates: str) -> Table:
    split = facts["split"]
    shared = split["molecules_in_two_splits"]
    leak = "no molecule stands in two splits" if not shared else f"{shared:,} molecules stand in more than one split"
    if shared and split["by"] == "structure":
        leak += " (split by structure)"
    table = Table(title=f"{facts['name']}: {facts['path']}", title_justify="left", show_header=False)
    for name, value in (
        ("structures", f"{facts['structures']:,} ({facts['atoms']:,} atoms, {facts['molecules']:,} molecules)"),
        ("quarantined", f"{facts['quarantined']:,}"),
        (f"split by {split['by']}", split_text(split["structures"], split["molecules"])),
        ("", leak),
        ("duplicates", duplicates),
        ("elements, cutoff", f"{' '.join(facts['elements'])}, {facts['cutoff']:g} Å"),
        ("boundaries", "periodic structures, each with its cell" if facts["periodic"] else "molecules"),
        ("size", f"{facts['bytes'] / 1e6:,.1f} MB in {facts['files']} files"),
        ("digest", facts["digest"]),
    ):
        table.add_row(name, value)
    return table


def _group_table(facts: dict) -> Table:
    table = Table(title="structures by number of atoms", title_justify="left")
    for name in ("atoms", "structures", *SPLITS, "rows a chunk", "rows a shard"):
        table.add_column(name, justify="right")
    for group in facts["groups"]:
        counts = dict.fromkeys(SPLITS, 0)
        for segment in group["segments"]:
            counts[segment["split"]] += segment["stop"] - segment["start"]
        values = (group["num_atoms"], group["rows"], *counts.values(), group["rows_per_chunk"], group["rows_per_shard"])
        table.add_row(*(f"{value:,}" for value in values))
    return table


# ----------------------------------------------------------------------------------------------------------- verify


def verify(path: Path) -> int:
    """Re-read a store, print each damaged file and chunk; 0 if it is whole, else 1. Raises DataError for no store."""
    console = Console(soft_wrap=True, highlight=False)
    if not Path(path).is_dir():
        open_store(path)  # says what is wrong
    problems = 0
    for problem in verification.check_files(path):
        problems += 1
        console.print(problem, markup=False)
    rows = 0
    try:
        chunks = verification.check_chunks(path)
        for count, found in track(chunks, "decoding", console=Console(stderr=True), disable=not console.is_terminal):
            rows += count
            problems += len(found)
            for problem in found:
                console.print(problem, markup=False)
    except DataError as error:
        problems += 1
        console.print(str(error), markup=False)
    if problems:
        console.print(f"{path} is damaged: {problems} problems; shard it again", markup=False)
        return 1
    console.print(f"{path} is whole: {rows:,} structures, every file and every chunk checked", markup=False)
    return 0
