"""`hpcmlip` commands as child processes on one thread, with their CPU time."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil

from hpcmlip.errors import RunError
from hpcmlip.training.metrics import METRICS

_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
_POLL_SECONDS = 0.1
_START_UP_SECONDS = 300
"""CPU time that start-up and the first steps of a run may take."""


class Commands:
    """Runs commands, also from several threads, and can end all that run."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()

    def run(self, *arguments, log: Path) -> float:
        """CPU seconds of `hpcmlip` with these arguments. Raises RunError with the end of its output if it fails."""
        process = self._start(arguments, log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        self._running.discard(process)
        if process.returncode:
            raise _failure(process, log)
        return usage.ru_utime + usage.ru_stime

    def seconds_per_step(self, config: Path, run_dir: Path, seconds: float) -> float:
        """CPU seconds of a training step, measured over `seconds` of a run that is then given up."""
        log = run_dir.with_suffix(".txt")
        process = self._start(("train", config, "--run-dir", run_dir), log)
        # the run has no end of its own: should this process be killed, it must not stay behind
        resource.prlimit(process.pid, resource.RLIMIT_CPU, (_START_UP_SECONDS + int(seconds),) * 2)
        try:
            samples = [(0.0, 0)]
            # the first is the time at which the first steps were done; start-up lies before it
            while len(samples) < 3 or samples[-1][0] - samples[1][0] < seconds:
                time.sleep(_POLL_SECONDS)
                if process.poll() is not None:
                    raise _failure(process, log)
                step = _last_step(run_dir / METRICS)
                if step > samples[-1][1]:
                    samples.append((_cpu_seconds(process), step))
        finally:
            process.kill()
            process.wait()
            self._running.discard(process)
        (begin, first), (end, last) = samples[1], samples[-1]
        return (end - begin) / (last - first)

    def end(self) -> None:
        """Ask all that run to stop; a training run then leaves a checkpoint."""
        for process in list(self._running):
            process.terminate()

    def _start(self, arguments, log: Path) -> subprocess.Popen:
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hpcmlip", *map(str, arguments)]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | _ENVIRONMENT)
        self._running.add(process)
        return process


def _failure(process: subprocess.Popen, log: Path) -> RunError:
    lines = log.read_text().strip().splitlines() or ["no output"]
    return RunError(f"exit code {process.returncode}: {lines[-1]} (all of it in {log})")


def _cpu_seconds(process: subprocess.Popen) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def _last_step(metrics: Path) -> int:
    """Of the training steps that have reached the disk; 0 if none."""
    if not metrics.exists():
        return 0
    for line in reversed(metrics.read_text().splitlines()):
        try:
            return json.loads(line)["step"]
        except ValueError:  # not yet written whole
            continue
    return 0
