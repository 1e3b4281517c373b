"""R16, R18: who may work in a run directory: one job at a time, and always with the same config."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from runs import RunDir

from hpcmlip.config import RunConfig, flat, load
from hpcmlip.errors import ConfigError
from hpcmlip.training.rundir import CHECKPOINTS, MAY_CHANGE, RunDirectory, holder

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

HPCMLIP = ("-m", "hpcmlip")
ENDED = {"SLURM_JOB_END_TIME": "1"}
"""A job that should have ended: training takes the directory, then leaves with 75 before its first step."""


def start(config: Path, run_dir: Path, *settings: str, program: Sequence[str] = HPCMLIP, **env) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *program, "train", config, *settings, "--run-dir", run_dir],
        env=os.environ | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """(exit code, what it said) of a process that ends by itself."""
    try:
        _, said = process.communicate(timeout=240)
    finally:
        process.kill()
    return process.returncode, said


# ----------------------------------------------------------------------------------------------------- R16: two jobs


@pytest.fixture
def first(write_run, tmp_path):
    """(config, run directory, process) of Slurm job 4711, which trains there and goes on to do so."""
    config, run_dir = write_run(tmp_path, train={"epochs": 1000, "checkpoint_minutes": 0.0}), tmp_path / "run"
    process = start(config, run_dir, SLURM_JOB_ID="4711", SLURM_JOB_END_TIME=str(int(time.time()) + 86400))
    try:
        while not RunDir(run_dir).steps():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        yield config, run_dir, process
    finally:
        process.kill()
        process.wait()


def intrusions(code: int, said: str, run_dir: Path) -> list[str]:
    """What is wrong about the end of a second job in the directory of job 4711."""
    wrong = [] if code == 1 else [f"exit code {code}"]
    wrong += [] if "is in use by process" in said and "Slurm job 4711" in said else ["the owner is not named"]
    return wrong + ([] if "Slurm job 4711" in holder(run_dir) else [f"the lock names {holder(run_dir)}"])


@pytest.mark.fault("R16", sample=1, soak=5)
def test_a_second_job_is_refused_and_a_dead_one_is_replaced(first, draw):
    config, run_dir, process = first
    time.sleep(draw.rng.uniform(0, 2))
    assert not intrusions(*end(start(config, run_dir, SLURM_JOB_ID="4712", **ENDED)), run_dir)
    assert process.poll() is None, "the first job was disturbed"
    process.kill()
    process.wait()
    assert "Slurm job 4711" in holder(run_dir), "a dead job leaves its name"
    code, said = end(start(config, run_dir, SLURM_JOB_ID="4713", **ENDED))
    assert code == 75 and "Slurm job 4713" in holder(run_dir), said


@pytest.mark.control("R16", broken="no lock")
def test_the_check_sees_a_job_that_gets_in(first, broken):
    config, run_dir, _ = first
    second = start(config, run_dir, program=broken("lock"), SLURM_JOB_ID="4712", **ENDED)
    assert intrusions(*end(second), run_dir)


# ------------------------------------------------------------------------------------------------ R18: another config


def another(value):
    """A value of the same kind, or None."""
    if isinstance(value, bool):
        return not value
    return {int: lambda: value + 1, float: lambda: 2 * value + 1}.get(type(value), lambda: None)()


def changes(config: Path) -> list[str]:
    """`key=value` for each setting that can be given another value."""
    old = flat(load(RunConfig, config).model_dump())
    possible = [f"{key}={another(value)}" for key, value in old.items() if another(value) is not None]
    return [setting for setting in possible if _is_valid(config, setting)]


def _is_valid(config: Path, setting: str) -> bool:
    try:
        load(RunConfig, config, [setting])
    except ConfigError:
        return False
    return True


def refusals(code: int, said: str, setting: str) -> list[str]:
    """What is wrong about the end of a start with another value of a setting that makes the run."""
    key, value = setting.split("=")
    wrong = [] if code == 2 else [f"exit code {code}"]
    return wrong + ([] if f"{key}: " in said and f" -> {value}" in said else ["the difference is not named"])


@pytest.fixture
def begun(write_run, tmp_path):
    """(config, run directory) of a run that has begun, and for all that a look at its folder tells has a checkpoint."""
    config, run_dir = write_run(tmp_path), tmp_path / "run"
    with RunDirectory(run_dir, load(RunConfig, config)):
        (run_dir / CHECKPOINTS / "one").mkdir(parents=True)
    return config, run_dir


@pytest.mark.fault("R18", sample=2, soak=20)
def test_a_changed_config_is_refused_unless_it_changes_no_number(begun, draw):
    config, run_dir = begun
    is_safe = draw.number % 2 == 1
    setting = draw.rng.choice([change for change in changes(config) if change.startswith(MAY_CHANGE) == is_safe])
    print(setting)
    before = (run_dir / "config.yaml").read_text()
    code, said = end(start(config, run_dir, setting, **ENDED))
    if is_safe:
        assert code == 75, said
    else:
        assert not refusals(code, said, setting), said
        assert (run_dir / "config.yaml").read_text() == before


@pytest.mark.control("R18", broken="configs are not compared")
def test_the_check_sees_a_config_that_gets_in(begun, broken):
    config, run_dir = begun
    setting = "optim.lr=0.01"
    assert refusals(*end(start(config, run_dir, setting, program=broken("comparison"), **ENDED)), setting)
