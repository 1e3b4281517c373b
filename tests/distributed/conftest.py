"""Runs that are started, interrupted and continued."""

import copy
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

MPIRUN = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "-n"]
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
RUN = {
    "name": "t",
    "data": {"levels": {"dz": "EF", "cc": "E"}, "pairs_per_batch": 1250},
    "model": {"kind": "hipnn", "lmax": 1, "features": 8, "interactions": 1, "cutoff": 6.5},
    "optim": {"lr": 2.0e-3, "ema_decay": 0.9, "schedule": {"kind": "cosine", "warmup_steps": 5}},
    "train": {"epochs": 2, "micro_batches_per_step": 2, "checkpoint_minutes": 60.0, "checkpoint_steps": 3},
    "engine": {"device": "cpu", "timeout_minutes": 2.0},
}


@pytest.fixture(scope="session")
def write_run(ab_initio_store):
    """`write_run(folder, **sections)` -> path of a RUN.yaml whose sections are updated with these."""

    def write(folder: Path, *, store: Path = ab_initio_store, **sections) -> Path:
        values = {key: {**RUN[key], **sections.get(key, {})} if isinstance(RUN[key], dict) else RUN[key] for key in RUN}
        values["data"]["stores"] = [str(store)]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "run.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return write


@dataclass(frozen=True)
class Ended:
    returncode: int
    output: str


@pytest.fixture(scope="session")
def mpirun():
    """`mpirun(ranks, *arguments, when=None, send=None, to=None)`: `hpcmlip` under mpirun -> Ended.

    As soon as `when()` is true the first `to` ranks (None: all) get the signal `send`.
    """

    def run(
        ranks: int,
        *arguments,
        when: Callable[[], bool] | None = None,
        send: signal.Signals | None = None,
        to: int | None = None,
    ) -> Ended:
        command = [*MPIRUN, str(ranks), sys.executable, "-m", "hpcmlip", *map(str, arguments)]
        process = subprocess.Popen(
            command, env=os.environ | AS_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            if when is not None:
                _send_when(process, when, send, to)
            output, _ = process.communicate(timeout=180)
        finally:
            for member in _ranks(process):
                member.kill()
            process.kill()
        return Ended(process.returncode, output)

    return run


def _send_when(process: subprocess.Popen, when: Callable[[], bool], number: signal.Signals, to: int | None) -> None:
    deadline = time.monotonic() + 120
    while not when():
        assert process.poll() is None, f"ended before the signal:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "never came so far"
        time.sleep(0.005)
    for member in _ranks(process)[:to]:
        member.send_signal(number)


def _ranks(process: subprocess.Popen) -> list[psutil.Process]:
    try:
        members = psutil.Process(process.pid).children(recursive=True)
        return [member for member in members if "hpcmlip" in " ".join(member.cmdline())]
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="session")
def run_values() -> dict:
    """RUN.yaml without its stores, as plain values."""
    return copy.deepcopy(RUN)
