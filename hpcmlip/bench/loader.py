"""Shuffled epochs of a store on one core: structures/s out of collate, with energies alone and with forces; memory.

The loader is the one that trains, thread and all, but nothing is trained. A turn is a process of its own that begins
with an empty cache. With --mace, MACE's loader takes turns with it on the same molecules. Checked first: no structure
comes twice, and the steps are the same for 1, 2 and 4 ranks.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from rich.console import Console
from rich.table import Table

from hpcmlip.batch import AtomsBatch
from hpcmlip.bench import mace_data
from hpcmlip.bench.sharding import shard
from hpcmlip.bench.stepping import ratio
from hpcmlip.config import DataSection
from hpcmlip.configs import path as config_path
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import TrainLoader

COMPONENT = "structures/s of the loader on one core, beside MACE's"
CONFIG = "data/xtb_nms.yaml"
LEVEL = "gfn1_xtb"
"""Of the raw file, for MACE."""
STREAMS = 4
CUTOFF = 6.5
"""Å."""
EVERY = 10
"""MACE gets every so many-th conformation: to prepare all of them takes minutes."""
MACE_BATCH = 64
CHECKED_STEPS = 100


def main(args: Sequence[str]) -> int:
    """Check the order, then time; prints a table and a line of JSON; 1 if the order is wrong."""
    options = _parse(args)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="hpcmlip-bench-") as folder:
        store = options.store or _store(options.data, Path(folder))
        levels = dict(item.split("=", 1) for item in options.levels)
        if not _order_is_right(store, levels):
            print("an epoch does not hold each structure once, or depends on the number of ranks")
            return 1
        cases = {"energies": {next(iter(levels)): "E"}, " ".join(options.levels): levels}
        rates, megabytes, mace = _take_turns(store, cases, options, Path(folder))
        structures = Dataset.open([store], levels).count("train")
    rows = [_row(f"hpcmlip, {name}", rates[name], megabytes[name]) for name in cases]
    result = {"benchmark": "loader, one core", "structures": structures, "rates": rates}
    if mace:
        rows.append(_row(f"mace-torch {mace}", rates["mace"], None))
        slow = [1 / rate for rate in rates["mace"]]
        result["ratio_to_mace"] = {name: ratio(slow, [1 / rate for rate in rates[name]]) for name in cases}
    _show(result | {"rows": rows})
    return 0


def _row(name: str, rates: Sequence[float], megabytes: int | None) -> dict:
    low, median, high = np.quantile(rates, (0.25, 0.5, 0.75)).round().astype(int).tolist()
    return {"loader": name, "structures_per_s": median, "quartiles": [low, high], "mb": megabytes}


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hpcmlip bench loader", description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--store", type=Path, help="a store")
    source.add_argument("--data", type=Path, help="raw file of xtb_nms.yaml: sharded first, and for MACE")
    parser.add_argument("--levels", nargs="+", default=["gfn1=EF", "gfn2=EF"], metavar="LEVEL=E|EF")
    parser.add_argument("--mace", type=Path, metavar="PYTHON", help="a Python that has mace-torch (needs --data)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a turn")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(args)
    if options.mace and not options.data:
        parser.error("--mace needs --data")
    return options


def _store(raw: Path, folder: Path) -> Path:
    store = folder / "store.zarr"
    shard(config_path(CONFIG), store, [f"sources=['{raw.absolute()}']"], len(os.sched_getaffinity(0)), watch=False)
    return store


def _take_turns(store: Path, cases: dict[str, dict[str, str]], options, folder: Path) -> tuple[dict, dict, str]:
    """(rates of each turn, largest memory in MB, version of MACE if it takes part)."""
    rates: dict[str, list[float]] = {name: [] for name in cases}
    megabytes = dict.fromkeys(cases, 0)
    mace = None
    if options.mace:
        mace_data.write_extxyz(options.data, folder / "mace.xyz", LEVEL, EVERY)
        mace_data.prepare(options.mace, folder / "mace.xyz", folder / "mace", CUTOFF, 2)
        mace = mace_data.Loader(options.mace, folder / "mace", CUTOFF, MACE_BATCH, min(os.sched_getaffinity(0)))
        rates["mace"] = []
    for _ in range(options.repeats):
        for name, levels in cases.items():
            found = turn(store, levels, options.seconds)
            rates[name].append(found["structures"] / found["seconds"])
            megabytes[name] = max(megabytes[name], found["megabytes"])
        if mace:
            rates["mace"].append(mace.rate(options.seconds))
    if mace:
        mace.close()
    return rates, megabytes, mace.version if mace else ""


def turn(store: Path, levels: dict[str, str], seconds: float) -> dict:
    """{"structures", "seconds", "megabytes"} of cold epochs on one core, at most so long, by a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_turn, store, levels, seconds).result()


def _turn(store: Path, levels: dict[str, str], seconds: float) -> dict:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    _loader(store, levels, range(STREAMS)).close()  # imports
    before = psutil.Process().memory_info().rss
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        loader = _loader(store, levels, range(STREAMS))
        for step in loader.batches(0):
            count += sum(block.num_structures for blocks in step for block in blocks)
            if time.perf_counter() - begin > seconds:
                break
        elapsed = time.perf_counter() - begin
        loader.close()
    # of the last loader, which still holds what it held
    grown = round((psutil.Process().memory_info().rss - before) / 1e6)
    return {"structures": count, "seconds": elapsed, "megabytes": grown}


def _loader(store: Path, levels: dict[str, str], streams: Sequence[int]) -> TrainLoader:
    section = DataSection(stores=(store,), levels=levels)
    dataset = Dataset.open([store], levels)
    return TrainLoader(dataset, section, streams=streams, num_streams=STREAMS, seed=0, cutoff=CUTOFF)


def _order_is_right(store: Path, levels: dict[str, str]) -> bool:
    """Are the structures of the first steps the same for all numbers of ranks, and none there twice?"""
    seen = []
    for ranks in (1, 2, 4):
        loaders = [_loader(store, levels, range(rank, STREAMS, ranks)) for rank in range(ranks)]
        steps = zip(*(itertools.islice(loader.batches(0), CHECKED_STEPS) for loader in loaders), strict=True)
        seen.append([_sources([blocks for part in step for blocks in part]) for step in steps])
        for loader in loaders:
            loader.close()
    everything = np.concatenate(seen[0])
    same = all(np.array_equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))
    return same and len(np.unique(everything, axis=0)) == len(everything)


def _sources(micro_batches: Iterable[Sequence[AtomsBatch]]) -> np.ndarray:
    """[B, 4] sources of the structures of a step that have a weight, sorted."""
    parts = [block.source[block.weight.numpy() > 0] for blocks in micro_batches for block in blocks]
    return np.unique(np.concatenate(parts), axis=0)


def _show(result: dict) -> None:
    table = Table(title=f"{result['benchmark']}, {result['structures']:,} structures", title_justify="left")
    for column in ("loader", "structures/s", "MB"):
        table.add_column(column, justify="left" if column == "loader" else "right")
    for row in result["rows"]:
        table.add_row(row["loader"], f"{row['structures_per_s']:,}", "" if row["mb"] is None else f"{row['mb']:,}")
    console = Console()
    console.print(table)
    for name, (median, (low, high)) in result.get("ratio_to_mace", {}).items():
        console.print(f"{name}: {median:,} times as fast as MACE's (quartiles {low:,} to {high:,})")
    print(json.dumps(result))
