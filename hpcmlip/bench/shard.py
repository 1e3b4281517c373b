"""Sharding: structures a second of the whole command, and peak memory on a file and on one ten times as large.

Each run is a fresh `hpcmlip shard` in processes of its own, start-up included. Memory is the largest sum over all its
processes, sampled; pages that processes share are counted by share (PSS).
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

import h5py
import yaml

from hpcmlip.bench import mace_data
from hpcmlip.bench.sharding import Sharded, shard, show
from hpcmlip.bench.stepping import ratio
from hpcmlip.errors import ConfigError

COMPONENT = "structures/s of sharding, peak memory on a 10x larger file"
COPIES = 10
SHIFT = 1e-3
"""Å between copies."""
LEVEL, CUTOFF = "gfn1_xtb", 6.5
"""What MACE prepares: energies and forces of a level, neighbours within Å."""
EVERY = 10
"""MACE gets every so many-th conformation of the same molecules: it takes a second for some 500."""


def main(args: list[str]) -> int:
    """Run the benchmark; prints a table and a JSON object."""
    parser = argparse.ArgumentParser(prog="hpcmlip bench shard", description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, metavar="DATA.yaml")
    parser.add_argument("--data", type=Path, help="raw HDF5 file in place of the config's sources")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="peak memory on the file and on ten copies of it")
    parser.add_argument("--copies", type=int, default=1, help="speed: time a file of this many copies")
    parser.add_argument(
        "--mace", type=Path, metavar="PYTHON", help="speed: mace_prepare_data of that Python takes turns"
    )
    options = parser.parse_args(args)
    if not options.config.is_file():
        raise ConfigError(f"there is no config {options.config}; 'hpcmlip configs' lists those of the package")
    if options.mace and not options.data:
        raise ConfigError("--mace needs the raw file: give it with --data")
    with tempfile.TemporaryDirectory(prefix="hpcmlip-bench-") as folder:
        work = Path(folder)
        result = _memory(options, work) if options.memory else _speed(options, work)
    if "ratio_to_mace" in result:
        print(f"mace_prepare_data, {LEVEL}: {statistics.median(result['mace_structures_per_s']):,.0f} structures/s")
        for name, (median, (low, high)) in result["ratio_to_mace"].items():
            print(f"hpcmlip, {name}: {median} times as many (quartiles {low} to {high})")
    show(result)
    return 0


def _speed(options, work: Path) -> dict:
    source, processes = _replicate(options, work, options.copies), max(options.workers)
    runs: dict[tuple[Path, int], list[Sharded]] = {(options.config, workers): [] for workers in options.workers}
    mace: list[float] = []
    if options.mace:
        runs[_one_level(options.config, work), processes] = []
        frames = mace_data.write_extxyz(options.data, work / "mace.xyz", LEVEL, EVERY)
    for repeat in range(options.repeats):
        for (config, workers), found in runs.items():
            found.append(_run(config, source, work, workers, watch=False))
        if options.mace:
            seconds = mace_data.prepare(options.mace, work / "mace.xyz", work / f"mace{repeat}", CUTOFF, processes)
            mace.append(seconds / frames)
    rows = [
        _row(f"hpcmlip, {workers}" + (f", {LEVEL} alone" if config != options.config else ""), found)
        for (config, workers), found in runs.items()
    ]
    result = {"benchmark": "shard speed", "cores": len(os.sched_getaffinity(0)), "rows": rows}
    if mace:
        result["mace_structures_per_s"] = [round(1 / seconds, 1) for seconds in mace]
        result["ratio_to_mace"] = {
            config.stem: ratio(mace, [found.seconds / found.structures for found in runs[config, processes]])
            for config, workers in runs
            if workers == processes
        }
    return result


def _one_level(config: Path, work: Path) -> Path:
    """The same with the level that MACE gets and none else."""
    section = yaml.safe_load(config.read_text(encoding="utf-8"))
    section["levels"] = {k: v for k, v in section["levels"].items() if v["energy"] == f"{LEVEL}.energy"}
    path = work / f"{config.stem}_{LEVEL}.yaml"
    path.write_text(yaml.safe_dump(section))
    return path


def _row(name: str, runs: list[Sharded]) -> dict:
    seconds = statistics.median(run.seconds for run in runs)
    return {
        "program, workers": name,
        "structures": runs[0].structures,
        "median_s": round(seconds, 2),
        "all_s": [round(run.seconds, 2) for run in runs],
        "structures_per_s": round(runs[0].structures / seconds),
    }


def _memory(options, work: Path) -> dict:
    rows = []
    for copies in (1, COPIES):
        source = _replicate(options, work, copies)
        for workers in options.workers:
            runs = [_run(options.config, source, work, workers, watch=True) for _ in range(options.repeats)]
            peak = statistics.median(run.peak_bytes for run in runs)
            rows.append(
                {
                    "workers": workers,
                    "structures": runs[0].structures,
                    "peak_mb": round(peak / 1e6, 1),
                    "all_mb": [round(run.peak_bytes / 1e6, 1) for run in runs],
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
                    # moved as a whole: the same molecule, but no duplicate
                    target[f"{name}_{copy}"]["coordinates"][...] += copy * SHIFT
    return path


def _run(config: Path, source: Path | None, work: Path, workers: int, *, watch: bool) -> Sharded:
    return shard(config, work / "out.zarr", [f"sources=['{source}']"] if source else [], workers, watch=watch)
