"""R24: many faults of many kinds in one long run; it ends with the bits of one that was left alone.

A campaign keeps the run and the number of faults in its folder, so that it too is made in pieces.
"""

import itertools
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from runs import RunDir, differences

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(4 * 3600)]

FAULTS = {True: 50, False: 2}
EPOCHS = {True: 120, False: 4}
"""Of 15 steps; a run that ends before all its faults is compared, and followed by another."""
LATEST = 2.5
"""Moments lie between the start and so many times the duration of a start with three steps."""


@dataclass
class Campaign:
    """Faults so far, kept in a file so that a later session goes on."""

    folder: Path
    faults: list[str]

    @classmethod
    def open(cls, folder: Path) -> "Campaign":
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "faults.json"
        return cls(folder, json.loads(path.read_text()) if path.exists() else [])

    def count(self, kind: str) -> None:
        self.faults.append(kind)
        (self.folder / "faults.json").write_text(json.dumps(self.faults))


def to_one(number: signal.Signals, rng: random.Random) -> Callable:
    return lambda ranks: rng.choice(ranks).send_signal(number)


def to_all(number: signal.Signals) -> Callable:
    def act(ranks: list[psutil.Process]) -> None:
        for rank in ranks:
            rank.send_signal(number)

    return act


def no_space(ranks: list[psutil.Process]) -> None:
    """No file of rank 0 may grow beyond 2 kB from now on: a checkpoint, a model, a log."""
    rank = ranks[0]
    rank.rlimit(psutil.RLIMIT_FSIZE, (2048, 2048))


def stop_file(run_dir: Path) -> Callable:
    def act(ranks: list[psutil.Process]) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "STOP").touch()

    return act


def damage(run_dir: Path, rng: random.Random) -> None:
    """One file of the newest checkpoint, while nothing runs: cut off, emptied, removed or a bit flipped."""
    folders = sorted((run_dir / "checkpoints").glob("step_*"))
    if len(folders) < 2:
        return
    path = rng.choice(sorted(folders[-1].iterdir()))
    content, how = path.read_bytes(), rng.choice(["cut", "empty", "removed", "flipped"])
    if how == "removed":
        path.unlink()
    elif how == "flipped":
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
    else:
        path.write_bytes(content[: rng.randrange(len(content)) if how == "cut" else 0])


def leftovers(run_dir: Path, rng: random.Random) -> None:
    """What a job killed elsewhere may leave: half a checkpoint, a metrics line that was cut off, a rendezvous file."""
    half = run_dir / "checkpoints" / ".tmp-step_00000001"
    half.mkdir(parents=True, exist_ok=True)
    (half / "master.safetensors").write_bytes(rng.randbytes(100))
    (run_dir / ".rendezvous-slurm-1.0.0.json").write_text('{"addresses": ["127.0.0.1"], "port": 1, "token": "x"')
    if (run_dir / "metrics.jsonl").exists():
        with (run_dir / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "step": 1')


SIGNALS = {
    "kill -9 of a rank": lambda rng, _: to_one(signal.SIGKILL, rng),
    "kill -9 of all ranks": lambda rng, _: to_all(signal.SIGKILL),
    "TERM": lambda rng, _: to_all(signal.SIGTERM),
    "USR1": lambda rng, _: to_all(signal.SIGUSR1),
    "USR2 to one rank": lambda rng, _: to_one(signal.SIGUSR2, rng),
    "INT": lambda rng, _: to_all(signal.SIGINT),
    "STOP file": lambda rng, run_dir: stop_file(run_dir),
    "a rank hangs": lambda rng, _: to_one(signal.SIGSTOP, rng),
    "no space": lambda rng, _: no_space,
}
BETWEEN = {"damaged checkpoint": damage, "leftovers": leftovers}
"""Done to the directory after a kill."""


@pytest.fixture(scope="module")
def reference(write_run, mpirun, soak_folder):
    """`reference(is_soak)` -> (config, run directory of an undisturbed run, seconds of a start)."""

    def run(is_soak: bool):
        folder = soak_folder / ("r24" if is_soak else "r24-short")
        config = write_run(
            folder, train={"epochs": EPOCHS[is_soak], "checkpoint_steps": 5}, engine={"timeout_minutes": 0.25}
        )
        ended = mpirun(2, "train", config, "--run-dir", folder / "alone", timeout=1800)
        assert ended.returncode == 0, ended.output
        start = RunDir(folder / "start")
        shutil.rmtree(start.path, ignore_errors=True)
        started = mpirun(2, "train", config, "--run-dir", start.path, when=start.steps, send=signal.SIGKILL)
        return config, RunDir(folder / "alone"), started.seconds

    return run


@pytest.mark.fault("R24", sample=1, soak=1)
def test_many_faults_change_no_bit(reference, mpirun, soak_folder, record_property, draw):
    config, alone, start_seconds = reference(draw.is_soak)
    campaign = Campaign.open(soak_folder / "r24" / "disturbed")
    for number in itertools.count(len(campaign.faults)):
        rng = random.Random(f"{draw.seed}/{number}")
        run_dir = RunDir(campaign.folder / "run")
        is_last = number >= FAULTS[draw.is_soak]
        kind = rng.choice(sorted(SIGNALS))
        moment = rng.uniform(0, LATEST * start_seconds)
        arguments = (2, "train", config, "--run-dir", run_dir.path)
        ended = mpirun(
            *arguments, **({} if is_last else {"after": moment, "act": SIGNALS[kind](rng, run_dir.path)}), timeout=1800
        )
        if ended.returncode == 0 and (run_dir.path / "done.json").exists():
            assert not differences(run_dir, alone), f"after {len(campaign.faults)} faults"
            if is_last:
                break
            shutil.rmtree(run_dir.path)  # done before all faults were: another run takes the rest
            continue
        assert not is_last, ended.output
        assert "Traceback" not in ended.output, f"{kind} after {moment:.1f} s\n{ended.output}"
        if ended.was_hit:
            campaign.count(kind)
        what = rng.choice([None, None, *sorted(BETWEEN)])
        if what is not None and run_dir.path.exists():
            BETWEEN[what](run_dir.path, rng)
            campaign.count(what)
    told = Counter(campaign.faults)
    record_property("faults", len(campaign.faults))
    for kind, count in sorted(told.items()):
        record_property(kind, count)


@pytest.mark.control("R24", broken="resume without the moving average of the weights")
def test_the_comparison_sees_a_lost_average(reference, mpirun, broken, tmp_path):
    config, alone, _ = reference(False)
    run_dir, arguments = RunDir(tmp_path / "run"), (2, "train", config, "--run-dir", tmp_path / "run")
    mpirun(*arguments, when=lambda: 5 in run_dir.steps(), send=signal.SIGKILL)
    ended = mpirun(*arguments, program=broken("average"))
    assert ended.returncode == 0, ended.output
    assert differences(run_dir, alone)
