"""What `hpcmlip shard` tells at the end."""

import csv
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from hpcmlip.data import store as stores
from hpcmlip.data.inspection import duplicates_text, level_table, split_counts, split_text, wide_console
from hpcmlip.data.store import DUPLICATES, QUARANTINE, SPLITS, Meta, molecules_of_splits

log = logging.getLogger(__name__)

FEW_MOLECULES = 5


def show(path: Path, *, unlabelled: int, seconds: float, phases: Mapping[str, float]) -> None:
    """Print the table of a store that was just built; `phases` are parts of the `seconds`."""
    store = stores.open_store(path)
    meta = store.meta
    size = sum(file["size"] for file in store.files.values())
    rows = max(meta.num_structures, 1)
    table = Table(title=f"{meta.name}: {path}", title_justify="left", show_header=False)
    splits = split_counts(meta)
    molecules = dict(zip(SPLITS, molecules_of_splits(store).sum(axis=0).tolist(), strict=True))
    parts = ", ".join(f"{name} {part:.1f} s" for name, part in phases.items())
    for name, value in (
        ("structures", f"{meta.num_structures:,}"),
        ("atoms", f"{sum(group.rows * group.num_atoms for group in meta.groups):,}"),
        ("molecules", f"{meta.num_molecules:,}"),
        (f"split by {meta.split['by']}", split_text(splits, molecules)),
        ("quarantined", f"{meta.quarantined:,}" + (_reasons(path / QUARANTINE) if meta.quarantined else "")),
        ("duplicates", duplicates_text(store) + _listed(path / DUPLICATES, store.duplicates["structures"])),
        ("without any label", f"{unlabelled:,}"),
        ("size", f"{size / 1e6:,.1f} MB in {len(store.files)} files, {size / rows:,.0f} bytes a structure"),
        ("time", f"{seconds:,.1f} s, {rows / seconds:,.0f} structures/s ({parts})"),
    ):
        table.add_row(name, value)
    console = wide_console()
    console.print(table)
    console.print(level_table(meta))
    _warn_of_few(meta, molecules)


def _warn_of_few(meta: Meta, molecules: Mapping[str, int]) -> None:
    for name, fraction in zip(SPLITS, meta.split["fractions"], strict=True):
        if name != "train" and fraction and meta.split["by"] != "structure" and molecules[name] < FEW_MOLECULES:
            log.warning(
                "the split '%s' holds %d molecule(s): errors on it say little about other molecules; a larger fraction "
                "would hold more",
                *(name, molecules[name]),
            )


def _reasons(report: Path) -> str:
    """How many conformations were left out for which reason, and where they are listed."""
    with report.open(newline="") as file:
        counts = Counter(line["reason"] for line in csv.DictReader(file))
    return f": {', '.join(f'{count:,} {reason}' for reason, count in counts.most_common())}{_listed(report, 1)}"


def _listed(report: Path, lines: int) -> str:
    return f" (listed in {report})" if lines else ""
