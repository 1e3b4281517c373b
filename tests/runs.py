"""Training runs that tests start, disturb and continue, and what these leave behind."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pytest
import yaml

MPIRUN = [str(Path(sys.executable).with_name("mpirun")), "--oversubscribe", "-n"]
MPIRUN_FAILED = "The PMIx server's listener thread failed to start"
AS_ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
RUN = {
    "name": "t",
    "data": {"levels": {"dz": "EF", "cc": "E"}, "pairs_per_batch": 1250},
    "model": {"kind": "hipnn", "lmax": 1, "features": 8, "interactions": 1, "cutoff": 6.5},
    "optim": {"lr": 2.0e-3, "ema_decay": 0.9, "schedule": {"kind": "cosine", "warmup_steps": 5}},
    "train": {"epochs": 2, "micro_batches_per_step": 2, "checkpoint_minutes": 60.0, "checkpoint_steps": 3},
    "engine": {"device": "cpu", "timeout_minutes": 2.0},
}


@dataclass(frozen=True)
class RunDir:
    """What a run left behind."""

    path: Path

    def steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step_")) for path in (self.path / "checkpoints").glob("step_*"))

    def newest(self) -> Path:
        """Folder of the newest checkpoint."""
        return self.path / "checkpoints" / f"step_{self.steps()[-1]:08d}"

    def state(self) -> dict:
        """JSON state of the newest checkpoint."""
        return json.loads((self.newest() / "state.json").read_text())

    def tensors(self) -> dict:
        """{(file, parameter): tensor} of the newest checkpoint."""
        import safetensors.torch

        files = {path.stem: safetensors.torch.load_file(path) for path in self.newest().glob("*.safetensors")}
        return {(stem, name): tensor for stem, group in files.items() for name, tensor in group.items()}

    def metrics(self, kind: str) -> list[dict]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if line["kind"] == kind]

    def model_hash(self) -> str:
        return hashlib.sha256((self.path / "model.safetensors").read_bytes()).hexdigest()

    def log(self) -> str:
        return (self.path / "log.txt").read_text()


def differences(found: RunDir, expected: RunDir) -> list[str]:
    """In what a finished run differs from another, bit for bit; empty where it does not."""
    import torch

    ours, theirs = found.tensors(), expected.tensors()
    different = [f"checkpoint {name}" for name in ours.keys() ^ theirs.keys()]
    common = ours.keys() & theirs.keys()
    different += [f"checkpoint {name}" for name in common if not torch.equal(ours[name], theirs[name])]
    if found.state()["progress"] != expected.state()["progress"]:
        different.append("progress")
    if found.model_hash() != expected.model_hash():
        different.append("model")
    for kind in ("train", "validation"):
        # each step once, and with the same numbers
        fields = ("step", "epoch", "loss", "lr", "objective", "levels")
        told = [[{f: m.get(f) for f in fields} for m in run.metrics(kind)] for run in (found, expected)]
        different += [f"metrics of {kind}"] if told[0] != told[1] else []
    return different


def pretend_finished(run_dir: Path) -> None:
    """A model and the record of an end, as `hpcmlip train` leaves them; weights that no network could load."""
    from hpcmlip.models.card import CARD, SCHEMA, WEIGHTS
    from hpcmlip.sealing import seal
    from hpcmlip.training import rundir

    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / WEIGHTS).write_bytes(b"weights")
    card = {"config": {}, "spec": {}, "weights_sha256": hashlib.sha256(b"weights").hexdigest()}
    (run_dir / CARD).write_text(seal(card, SCHEMA))
    if not (run_dir / rundir.CONFIG).exists():
        (run_dir / rundir.CONFIG).write_text("{}")
    rundir.write_end(run_dir, {"reason": "all 2 epochs done", "step": 7})


@dataclass(frozen=True)
class Ended:
    returncode: int
    output: str
    seconds: float
    was_hit: bool
    """The signal was sent before it ended by itself."""


@pytest.fixture(scope="session")
def run_values() -> dict:
    """RUN.yaml without its stores, as plain values."""
    return copy.deepcopy(RUN)


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


@pytest.fixture(scope="session")
def mpirun():
    """`mpirun(ranks, *arguments, when=None, after=None, send=None, to=None, act=None, env=None, timeout=180)` -> Ended.

    `hpcmlip`, or another Python `program`, under mpirun. As soon as `when()` is true, or `after` so many
    seconds, the ranks `to` (None: all) get the signal `send`, or `act` is called with the processes of all ranks.
    """

    def run(
        ranks: int,
        *arguments,
        when: Callable[[], bool] | None = None,
        after: float | None = None,
        send: signal.Signals | None = None,
        to: Sequence[int] | None = None,
        act: Callable[[list[psutil.Process]], None] | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 180,
        program: Sequence[str] = ("-m", "hpcmlip"),
    ) -> Ended:
        command = [*MPIRUN, str(ranks), sys.executable, *program, *map(str, arguments)]
        named = {"when": when, "after": after, "send": send, "to": to, "act": act, "env": env}
        again = partial(run, ranks, *arguments, **named, timeout=timeout, program=program)
        began = time.monotonic()
        act = act or (lambda members: [member.send_signal(send) for member in (members[i] for i in to or range(ranks))])
        process = subprocess.Popen(
            command,
            env=os.environ | AS_ROOT | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        was_hit = False
        try:
            if when is not None:
                was_hit = _act_when(process, when, ranks, act)
            elif after is not None:
                was_hit = _act_when(process, lambda: time.monotonic() - began >= after, ranks, act)
            output, _ = process.communicate(timeout=timeout)
        finally:
            for member in ranks_of(process):
                member.kill()
            process.kill()
        ended = Ended(process.returncode, output, time.monotonic() - began, was_hit)
        assert when is None or was_hit or MPIRUN_FAILED in output, f"ended before the signal:\n{output}"
        # Open MPI itself, seen once in some hundred starts: nothing of ours has run yet
        return again() if MPIRUN_FAILED in output else ended

    return run


def _act_when(process: subprocess.Popen, when: Callable[[], bool], ranks: int, act: Callable) -> bool:
    """Wait and act; False if the program ended first."""
    deadline = time.monotonic() + 120
    while not when() or len(ranks_of(process)) < ranks:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "never came so far"
        time.sleep(0.005)
    try:
        act(ranks_of(process))
    except (psutil.NoSuchProcess, IndexError):
        return False
    return True


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The training processes below an mpirun, in the order of their start."""
    try:
        return sorted(psutil.Process(process.pid).children(), key=lambda member: member.pid)
    except psutil.NoSuchProcess:
        return []


def wait_for_end(pid: int, seconds: float) -> None:
    """Of any process; a zombie that nobody has waited for has ended too. Raises AssertionError."""
    deadline = time.monotonic() + seconds
    try:
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{process} goes on"
            time.sleep(0.1)
    except psutil.NoSuchProcess:
        pass
