"""What `hpcmlip shard` tells at the end."""

from pathlib import Path

from rich.table import Table

from hpcmlip.data import store as stores
from hpcmlip.data.inspection import level_table, split_counts, wide_console
from hpcmlip.data.store import SPLITS


def show(path: Path, *, unlabelled: int, seconds: float) -> None:
    """Print the table of a store that was just built."""
    store = stores.open_store(path)
    meta = store.meta
    size = sum(file["size"] for file in store.files.values())
    rows = max(meta.num_structures, 1)
    table = Table(title=f"{meta.name}: {path}", title_justify="left", show_header=False)
    splits = split_counts(meta)
    for name, value in (
        ("structures", f"{meta.num_structures:,}"),
        ("atoms", f"{sum(group.rows * group.num_atoms for group in meta.groups):,}"),
        ("molecules", f"{meta.num_molecules:,}"),
        (f"split by {meta.split['by']}", ", ".join(f"{split} {splits[split]:,}" for split in SPLITS)),
        (
            "quarantined",
            f"{meta.quarantined:,}" + (f" (listed in {path / 'quarantine.csv'})" if meta.quarantined else ""),
        ),
        ("without any label", f"{unlabelled:,}"),
        ("size", f"{size / 1e6:,.1f} MB in {len(store.files)} files, {size / rows:,.0f} bytes a structure"),
        ("time", f"{seconds:,.1f} s, {rows / seconds:,.0f} structures/s"),
    ):
        table.add_row(name, value)
    console = wide_console()
    console.print(table)
    console.print(level_table(meta))
