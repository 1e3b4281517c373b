"""`hpcmlip train --forecast` against the run itself: seconds of an epoch, a validation and the run, peak memory.

The forecast is made before the run and again after it, so that a machine that became busier meanwhile is seen.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hpcmlip.errors import RunError
from hpcmlip.training.metrics import METRICS
from hpcmlip.training.probe import WARM_UP_STEPS

COMPONENT = "train --forecast against the run that it foretells: time and memory"


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    stdout: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def main(args: Sequence[str]) -> int:
    """Forecast, run, forecast; print a table and a line of JSON."""
    options = _parse(args)
    with tempfile.TemporaryDirectory(prefix="hpcmlip-bench-") as work:
        run_dir = Path(work) / "run"
        command = ("train", options.run, *options.overrides, "--run-dir", run_dir)
        before, ran = _call(*command, "--forecast", "--json"), _call(*command)
        after = _call(*command, "--forecast", "--json")
        lines = [json.loads(line) for line in (run_dir / METRICS).read_text().splitlines()]
    forecasts = [_foretold(json.loads(ended.stdout)) for ended in (before, after)]
    seen = {**measured(lines), "run_seconds": ran.seconds, "peak_bytes": ran.peak_bytes}
    result = {
        "run": str(options.run),
        "overrides": options.overrides,
        "seen": seen,
        "forecasts": forecasts,
        "ratios": [{key: forecast[key] / seen[key] for key in seen} for forecast in forecasts],
        "cpu_seconds": {"forecast": before.cpu_seconds, "run": ran.cpu_seconds},
    }
    _show(result)
    return 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hpcmlip bench forecast", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as train.epochs=2")
    return parser.parse_args(args)


def _call(*arguments) -> Ended:
    """`hpcmlip` with these arguments. Raises RunError with the end of its output if it fails."""
    command = [sys.executable, "-m", "hpcmlip", *map(str, arguments)]
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        for file in (out, err):
            file.seek(0)
        if process.returncode:
            raise RunError(f"{' '.join(command)} failed: {err.read()[-2000:]}")
        return Ended(out.read(), seconds, usage.ru_utime + usage.ru_stime, 1024 * usage.ru_maxrss)


def _foretold(forecast: dict) -> dict:
    seconds = forecast["seconds"]
    return {
        "steps_per_epoch": forecast["steps_per_epoch"],
        "epoch_seconds": seconds["epoch"]["expected"],
        "validation_seconds": seconds["validation"]["expected"],
        "run_seconds": seconds["run"]["expected"],
        "peak_bytes": forecast["memory"]["machine"]["peak_bytes"],
    }


def measured(lines: Sequence[dict]) -> dict:
    """From the lines of a run's metrics: steps and seconds of an epoch, seconds of a validation."""
    steps = [line for line in lines if line["kind"] == "train"]
    # a difference across epochs would hold a validation
    within = [b["time"] - a["time"] for a, b in pairwise(steps[WARM_UP_STEPS:]) if a["epoch"] == b["epoch"]]
    validations = [b["time"] - a["time"] for a, b in pairwise(lines) if b["kind"] == "validation"]
    per_epoch = sum(line["epoch"] == 0 for line in steps)
    return {
        "steps_per_epoch": per_epoch,
        "epoch_seconds": per_epoch * statistics.mean(within),
        "validation_seconds": statistics.median(validations),
    }


def _show(result: dict) -> None:
    table = Table(title=f"Forecast of {result['run'].rpartition('/')[2]}", title_justify="left")
    table.add_column("")
    for column in ("forecast before", "after", "the run", "ratio before", "after"):
        table.add_column(column, justify="right")
    before, after = result["forecasts"]
    for key, value in result["seen"].items():
        ratios = [f"{ratio[key]:.2f}" for ratio in result["ratios"]]
        unit = 1e6 if key == "peak_bytes" else 1
        shown = [f"{number / unit:.4g}" for number in (before[key], after[key], value)]
        table.add_row(key.replace("peak_bytes", "peak MB").replace("_", " "), *shown, *ratios)
    Console().print(table)
    print(json.dumps(result))
