"""How long the program takes to begin, and what a run that begins asks of the file system of its store."""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from hpcmlip import configs
from hpcmlip.bench import startup_run
from hpcmlip.bench.commands import Commands
from hpcmlip.data.store import MANIFEST, METADATA
from hpcmlip.errors import EXIT_RESUMABLE, RunError

COMPONENT = "start-up: the command line, a run to its first step, and what it asks of the store's files"

DATA, PRESET = "data/ab_initio_small.yaml", "models/hipnn.yaml"


def main(args: Sequence[str]) -> int:
    """Print tables and a line of JSON."""
    options = _parse(args)
    helps = [_help() for _ in range(options.repeats + 1)][1:]  # the first one fills the cache of the disk
    with tempfile.TemporaryDirectory(prefix="hpcmlip-bench-") as work:
        config = options.run or make_run(Path(work))
        starts = [start(config, Path(work) / f"run{i}") for i in range(options.repeats + 1)][1:]
    phases = {phase: statistics.median(s["seconds"][phase] for s in starts) for phase in starts[0]["seconds"]}
    result = {
        "help_seconds": statistics.median(seconds for seconds, _ in helps),
        "help_cpu_seconds": statistics.median(cpu for _, cpu in helps),
        "train_seconds": phases,
        "store_files": summary(starts[-1]["uses"]),
        "run": str(options.run or PRESET),
        "repeats": options.repeats,
    }
    _show(result)
    return 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hpcmlip bench startup", description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN.yaml", help="default: HIP-NN-TS on the packaged sample"
    )
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args(args)


def _help() -> tuple[float, float]:
    """Seconds by the clock and of the processor for `hpcmlip --help`."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "hpcmlip", "--help"], stdout=subprocess.DEVNULL, check=True)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def make_run(work: Path) -> Path:
    """RUN.yaml of the preset on the packaged sample, which is sharded for it."""
    store = work / "store.zarr"
    Commands().run("shard", configs.path(DATA), f"out={store}", "--workers", 1, log=work / "shard.txt")
    values = yaml.safe_load(configs.path(PRESET).read_text())
    values["data"]["stores"] = [str(store)]
    path = work / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(config: Path, run_dir: Path) -> dict:
    """What `startup_run` tells of a run that begins; alone. Raises RunError if it fails."""
    command = [sys.executable, "-m", startup_run.__name__, str(config), str(run_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    if ended.returncode != EXIT_RESUMABLE:
        raise RunError(f"{' '.join(command)} failed: {ended.stderr[-2000:]}")
    return json.loads(next(line for line in ended.stdout.splitlines() if line.startswith("{")))


def summary(uses: dict[str, dict[str, int]]) -> dict[str, int]:
    """How often a run that begins uses what of a store."""
    opened, looked_at = uses[startup_run.OPENED], uses[startup_run.LOOKED_AT]
    shards = {name: count for name, count in opened.items() if "/c/" in name}
    return {
        "root metadata read": opened.get(METADATA, 0),
        "manifest read": opened.get(MANIFEST, 0),
        "other metadata read": sum(opened.values()) - sum(shards.values()) - opened[METADATA] - opened[MANIFEST],
        "folders listed": sum(uses[startup_run.LISTED].values()),
        "shards opened": len(shards),
        "openings of shards": sum(shards.values()),
        "stats of shards": sum(count for name, count in looked_at.items() if "/c/" in name),
        "other stats": sum(count for name, count in looked_at.items() if "/c/" not in name),
    }


def _show(result: dict) -> None:
    table = Table(title="Start-up", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("hpcmlip --help", f"{result['help_seconds']:.2f} s ({result['help_cpu_seconds']:.2f} s of CPU time)")
    for phase, seconds in result["train_seconds"].items():
        table.add_row(f"train: {phase}", f"{seconds:.2f} s")
    for use, count in result["store_files"].items():
        table.add_row(f"store: {use}", str(count))
    Console().print(table)
    print(json.dumps(result))
