"""Sharding of 22 million conformations: files of ANI-1's layout and size, written here, read by the shipped reader.

Each run is a fresh `hpcmlip shard` of `configs/data/ani1.yaml`. Memory is the largest sum over all its processes. What
the store holds is counted as positions (float32), energies (float64) and one byte an atom for its element.
"""

import argparse
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
from rich.console import Console
from rich.table import Table

from hpcmlip import configs
from hpcmlip.bench import ani1_like, loader
from hpcmlip.bench.sharding import Sharded, shard, show
from hpcmlip.data.store import MANIFEST, open_store
from hpcmlip.units import HARTREE

COMPONENT = "sharding of 22 million conformations in ANI-1's layout: time, memory, size"
CONFIG = "data/ani1.yaml"
LEVEL, LOADER_SECONDS = "dz", 30.0
MODELLED = (1, 2, 4, 8, 16, 64)
PASSES = 2
"""Times that each row of a raw file is read."""
COMPARED = 40
"""Structures a group of the store that are compared with the raw files."""


def main(args: list[str]) -> int:
    """Write the files, shard them, compare structures; prints a table and a line of JSON; 1 if they differ."""
    parser = argparse.ArgumentParser(prog="hpcmlip bench ani1", description=__doc__.splitlines()[0])
    parser.add_argument("--fraction", type=float, default=1.0, help="of the conformations of each molecule")
    parser.add_argument("--workers", type=int, nargs="+", default=[2])
    parser.add_argument("--folder", type=Path, help="the files are kept here, or taken from here (9 GB of space)")
    options = parser.parse_args(args)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hpcmlip-bench-")))
        raw = _raw_files(folder / f"raw{options.fraction:g}", options.fraction)
        store = folder / "ani1.zarr"
        overrides = [f"sources={[str(path) for path in raw]}"]
        rows = []
        for workers in options.workers:
            run = shard(configs.path(CONFIG), store, overrides, workers, watch=True)
            rows.append(_row(run, workers, raw, store))
        different = _differences(store, raw)
        read = loader.turn(store, {LEVEL: "E"}, LOADER_SECONDS)
    result = {
        "benchmark": "shard in ANI-1's layout",
        "cores": len(os.sched_getaffinity(0)),
        "rows": rows,
        "loader": read,
    }
    rate = read["structures"] / read["seconds"]
    print(
        f"loader over this store, one core, empty cache: {rate:,.0f} structures/s, {read['megabytes']:,} MB of memory"
    )
    if len(rows) > 1:
        result["model"] = _model(rows)
        _show_model(result["model"])
    show(result)
    if different:
        print(f"{different} structures of the store differ from the raw files")
    return int(different > 0)


def _raw_files(folder: Path, fraction: float) -> list[Path]:
    """The eight files, written unless they are there."""
    if not folder.is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        ani1_like.write(partial, fraction=fraction, processes=len(os.sched_getaffinity(0)))
        partial.rename(folder)
    return sorted(folder.glob("*.h5"))


def _row(run: Sharded, workers: int, raw: list[Path], path: Path) -> dict:
    store = open_store(path)
    atoms = sum(group.rows * group.num_atoms for group in store.meta.groups)
    held = atoms * (3 * 4 + 1) + store.meta.num_structures * 8
    size = sum(file["size"] for file in store.files.values()) + (path / MANIFEST).stat().st_size
    return {
        "workers": workers,
        "structures": run.structures,
        "atoms": atoms,
        "seconds": round(run.seconds, 1),
        "structures_per_s": round(run.structures / run.seconds),
        "phases": run.phases,
        "cpu_seconds": round(run.cpu_seconds, 1),
        "peak_mb": round(run.peak_bytes / 1e6),
        "raw_mb": round(sum(file.stat().st_size for file in raw) / 1e6),
        "store_mb": round(size / 1e6),
        "files": len(store.files),
        "size_over_content": round(size / held, 3),
    }


def _model(rows: list[dict]) -> dict:
    """Seconds of W workers as serial + shared / W, from the runs with fewest and most workers, and what W workers ask
    of the file system."""
    few, many = rows[0], rows[-1]
    shared = (few["seconds"] - many["seconds"]) / (1 / few["workers"] - 1 / many["workers"])
    serial = few["seconds"] - shared / few["workers"]
    found = []
    for workers in MODELLED:
        seconds = serial + shared / workers
        found.append(
            {
                "workers": workers,
                "seconds": round(seconds, 1),
                "structures_per_s": round(few["structures"] / seconds),
                "read_mb_per_s": round(PASSES * few["raw_mb"] / seconds),
                "write_mb_per_s": round(few["store_mb"] / seconds),
                "new_files_per_s": round(few["files"] / seconds),
            }
        )
    return {"serial_seconds": round(serial, 1), "shared_seconds": round(shared, 1), "workers": found}


def _show_model(model: dict) -> None:
    title = f"Model: {model['serial_seconds']} s + {model['shared_seconds']} s / workers"
    table = Table(title=title, title_justify="left")
    for name in model["workers"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in model["workers"]:
        table.add_row(*(f"{value:,}" for value in row.values()))
    Console().print(table)


def _differences(path: Path, raw: list[Path]) -> int:
    """How many of some structures of each group are not in the raw files as the store has them."""
    store, rng, wrong = open_store(path), np.random.default_rng(0), 0
    with ExitStack() as stack:
        files = {file.name: stack.enter_context(h5py.File(file)) for file in raw}
        sources = [files[source.name] for source in store.meta.sources]
        groups = [sorted(f"{top}/{name}" for top in file for name in file[top]) for file in sources]
        for group in store.meta.groups:
            for row in np.sort(rng.choice(group.rows, min(COMPARED, group.rows), replace=False)).tolist():
                pos, energy, source = (store.read(group, name, row, row + 1)[0] for name in ("pos", "energy", "source"))
                node = sources[source[0]][groups[source[0]][source[1]]]
                same = np.array_equal(node["coordinates"][source[2]], pos)
                wrong += not (same and np.isclose(node["energies"][source[2]] * HARTREE, energy[0], rtol=1e-12))
    return wrong
