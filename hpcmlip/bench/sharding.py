"""One fresh `hpcmlip shard` in processes of its own: seconds, memory and processor time of all of them."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from hpcmlip.data.store import open_store
from hpcmlip.errors import RunError

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Sharded:
    """A run that has ended."""

    seconds: float
    structures: int
    phases: dict[str, float]
    """Seconds of listing, reading, writing, finishing, as the command tells them."""
    peak_bytes: int
    """Largest sum over its processes, pages that they share counted by share (PSS); 0: not watched."""
    cpu_seconds: float
    """Of all its processes; 0: not watched."""


def shard(config: Path, out: Path, overrides: Sequence[str], workers: int, *, watch: bool) -> Sharded:
    """Build the store `out` anew; to watch it costs time. Raises RunError with the end of its output if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "hpcmlip", "shard", str(config), f"out={out}", *overrides]
    log = out.with_suffix(".txt")
    began = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen([*command, "--workers", str(workers)], stdout=file, stderr=file)
        peak, cpu = _watch(process) if watch else (0, 0.0)
        code = process.wait()
    seconds, text = time.perf_counter() - began, log.read_text()
    if code:
        raise RunError(f"{' '.join(command)} failed: {text[-2000:]}")
    return Sharded(seconds, open_store(out).meta.num_structures, _phases(text), peak, cpu)


def _phases(text: str) -> dict[str, float]:
    (line,) = [line for line in text.splitlines() if "structures/s (" in line]
    return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.]+) s", line.partition("(")[2])}


def _watch(process: subprocess.Popen) -> tuple[int, float]:
    """(peak bytes, processor seconds) until it ends."""
    peak, cpu = 0, {}
    while process.poll() is None:
        total = 0
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(process.pid)
            for member in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += member.memory_full_info().pss
                    times = member.cpu_times()
                    cpu[member.pid] = times.user + times.system
        peak = max(peak, total)
        time.sleep(POLL_SECONDS)
    return peak, sum(cpu.values())


def show(result: dict) -> None:
    """The rows of a result as columns of a table, then all of it as a line of JSON."""
    table = Table(title=result["benchmark"], title_justify="left", show_header=False)
    for name in result["rows"][0]:
        table.add_row(name.replace("_", " "), *(_text(row[name]) for row in result["rows"]))
    Console().print(table)
    print(json.dumps(result))


def _text(value) -> str:
    if isinstance(value, int | float):
        return f"{value:,}"
    if isinstance(value, str):
        return value
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else ", ".join(map(str, value))
