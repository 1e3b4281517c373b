"""R13: a rank that hangs at any moment, start-up included; the others end within the timeout and leave their stacks."""

import signal
import subprocess
from pathlib import Path

import pytest
from runs import Ended, RunDir

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TIMEOUT = 12.0
GRACE = 10.0
"""Seconds that a rank may take from the timeout to its end."""


def complaints(ended: Ended | None, run_dir: Path, moment: float, *, stopped: int, start: float) -> list[str]:
    """What is wrong about two ranks of which one was stopped `moment` seconds after they began.

    `start`: seconds that the other may still have needed to begin to wait.
    """
    if ended is None:
        return ["it still runs"]
    wrong = [f"exit code {ended.returncode}"] if ended.returncode in (0, 75) else []
    late = ended.seconds - moment - start - TIMEOUT - GRACE
    wrong += [f"{late:.1f} s late"] if late > 0 else []
    wrong += ["a traceback"] if "Traceback" in ended.output else []
    if "did not find process 0" not in ended.output:  # before they met, and the sentence says who is missing
        sentences = ("lost contact with another rank", "has not moved for")
        wrong += [] if any(sentence in ended.output for sentence in sentences) else ["no sentence"]
        stacks = [run_dir / "stacks" / f"rank_{rank:05d}.txt" for rank in range(2)]
        wrong += [] if str(stacks[0].parent) in ended.output else ["the stacks are not named"]
        wrong += [] if "most recent call" in stacks[1 - stopped].read_text() else ["no stack of the waiting rank"]
    return wrong


def hang(mpirun, config, run_dir: Path, *, timeout: float = 180, **how) -> Ended | None:
    """Ended, or None if it still ran after `timeout` seconds."""
    try:
        arguments = (2, "train", config, "--run-dir", run_dir)
        return mpirun(*arguments, send=signal.SIGSTOP, timeout=timeout, **how)
    except subprocess.TimeoutExpired:
        return None


@pytest.mark.fault("R13", sample=1, soak=20)
def test_the_others_end_and_say_where_they_stood(undisturbed, write_run, mpirun, tmp_path, record_property, draw):
    rank, moment = draw.rng.randrange(2), draw.rng.uniform(0, undisturbed.seconds)
    print(f"SIGSTOP of rank {rank} after {moment:.2f} s")
    config, run_dir = write_run(tmp_path, engine={"timeout_minutes": TIMEOUT / 60}), tmp_path / "run"
    ended = hang(mpirun, config, run_dir, after=moment, to=[rank], timeout=120)
    if (run_dir / "done.json").exists():
        return  # stopped on its way out, when no one waited for it any more
    start = 0.0 if RunDir(run_dir).steps() else undisturbed.seconds
    assert not complaints(ended, run_dir, moment, stopped=rank, start=start), ended and ended.output
    record_property("seconds to the end", round(ended.seconds - moment, 1))


def test_rank_0_hangs_while_they_meet(write_run, mpirun, tmp_path):
    """Torch's store waits without limit for a host that is stopped."""
    config, run_dir = write_run(tmp_path, engine={"timeout_minutes": TIMEOUT / 60}), tmp_path / "run"
    ended = hang(mpirun, config, run_dir, when=lambda: any(run_dir.glob(".rendezvous*.json")), to=[0], timeout=120)
    assert not complaints(ended, run_dir, 0.0, stopped=0, start=100.0), ended and ended.output


@pytest.mark.control("R13", broken="collectives wait without limit")
def test_the_check_sees_a_wait_without_limit(write_run, mpirun, broken, tmp_path):
    config, run_dir = write_run(tmp_path, engine={"timeout_minutes": TIMEOUT / 60}), tmp_path / "run"
    ended = hang(
        *(mpirun, config, run_dir),
        when=lambda: 3 in RunDir(run_dir).steps(),
        to=[1],
        timeout=TIMEOUT + GRACE,
        program=broken("patience"),
    )
    assert complaints(ended, run_dir, 0.0, stopped=1, start=0.0) == ["it still runs"]
