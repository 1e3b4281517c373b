"""Sharding: structures a second of the whole command, and peak memory on a file and on one ten times as large.

Each run is a fresh `hpcmlip shard` in processes of its own, start-up included. Memory is the largest sum over all its
processes, sampled; pages that processes share are counted by share (PSS).
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import psutil
from rich.console import Console
from rich.table import Table

from hpcmlip.data.store import open_store
from hpcmlip.errors import ConfigError, RunError

COMPONENT = "structures/s of sharding, peak memory on a 10x larger file"
COPIES = 10


def main(args: list[str]) -> int:
    """Run the benchmark; prints a table and a JSON object."""
    parser = argparse.ArgumentParser(prog="hpcmlip bench shard", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, metavar="DATA.yaml")
    parser.add_argument("--data", type=Path, help="raw HDF5 file in place of the config's sources")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory on the file and on ten copies of it")
    parser.add_argument("--copies", type=int, default=1, help="speed: time a file of this many copies")
    options = parser.parse_args(args)
    if not options.config.is_file():
        raise ConfigError(f"there is no config {options.config}; 'hpcmlip configs' lists those of the package")
    with tempfile.TemporaryDirectory(prefix="hpcmlip-bench-") as folder:
        work = Path(folder)
        result = _memory(options, work) if options.memory else _speed(options, work)
    _print(result)
    return 0


def _speed(options, work: Path) -> dict:
    source = _replicate(options, work, options.copies)
    rows = []
    for workers in options.workers:
        runs = [_run(options.config, source, work, workers, watch=False) for _ in range(options.repeats)]
        seconds = statistics.median(run["seconds"] for run in runs)
        rows.append(
            {
                "workers": workers,
                "structures": runs[0]["structures"],
                "median_s": round(seconds, 2),
                "all_s": [round(run["seconds"], 2) for run in runs],
                "structures_per_s": round(runs[0]["structures"] / seconds),
            }
        )
    return {"benchmark": "shard speed", "cores": len(os.sched_getaffinity(0)), "rows": rows}


def _memory(options, work: Path) -> dict:
    rows = []
    for copies in (1, COPIES):
        source = _replicate(options, work, copies)
        for workers in options.workers:
            runs = [_run(options.config, source, work, workers, watch=True) for _ in range(options.repeats)]
            peak = statistics.median(run["peak"] for run in runs)
            rows.append(
                {
                    "workers": workers,
                    "structures": runs[0]["structures"],
                    "peak_mb": round(peak / 1e6, 1),
                    "all_mb": [round(run["peak"] / 1e6, 1) for run in runs],
                }
            )
    ratios = {
        str(workers): round(large["peak_mb"] / small["peak_mb"], 3)
        for workers in options.workers
        for small, large in [[row for row in rows if row["workers"] == workers]]
    }
    return {"benchmark": "shard memory", "rows": rows, "peak_ratio_by_workers": ratios}


def _replicate(options, work: Path, copies: int) -> Path | None:
    """A raw file with every group under `copies` names, so that each molecule size has as many times the rows."""
    if copies == 1:
        return options.data and options.data.absolute()
    if options.data is None:
        raise ConfigError("copies of a raw file need to know which: give it with --data")
    path = work / f"times{copies}.h5"
    if not path.exists():
        with h5py.File(options.data, "r") as source, h5py.File(path, "w") as target:
            for copy in range(copies):
                for name in source:
                    source.copy(name, target, name=f"{name}_{copy}")
    return path


def _run(config: Path, source: Path | None, work: Path, workers: int, *, watch: bool) -> dict:
    """One fresh command: seconds, CPU seconds, structures and, if watched (that costs time), peak bytes."""
    out = work / "out.zarr"
    shutil.rmtree(out, ignore_errors=True)
    overrides = [f"out={out}", *([f"sources=['{source}']"] if source else [])]
    command = [sys.executable, "-m", "hpcmlip", "shard", str(config), *overrides, "--workers", str(workers)]
    began = time.perf_counter()
    with open(work / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        peak = [0]
        if watch:
            _watch(process, peak)
        code = process.wait()
    seconds = time.perf_counter() - began
    if code:
        raise RunError(f"{' '.join(command)} failed: {(work / 'log.txt').read_text()[-2000:]}")
    return {
        "seconds": seconds,
        "peak": peak[0],
        "structures": open_store(out).meta.num_structures,
    }


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            for member in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += member.memory_full_info().pss
        peak[0] = max(peak[0], total)
        time.sleep(0.05)


def _print(result: dict) -> None:
    table = Table(title=result["benchmark"], title_justify="left")
    for name in result["rows"][0]:
        table.add_column(name.replace("_", " "), justify="right")
    for row in result["rows"]:
        table.add_row(*(f"{v:,}" if isinstance(v, int | float) else ", ".join(map(str, v)) for v in row.values()))
    Console().print(table)
    print(json.dumps(result))
