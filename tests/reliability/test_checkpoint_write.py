"""R6: kill -9 at any point of the writing of a checkpoint; the newest sound one is taken, never a part of one."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from runs import RunDir, differences

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

HERE = Path(__file__).parent
POINTS = 24
"""Of the checkpoint of a run, where nothing is removed."""


def kills(folder: Path, *mechanism: str) -> list[dict]:
    """Lines of checkpoint_kills.py."""
    command = [sys.executable, HERE / "checkpoint_kills.py", folder, *mechanism]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def complaints(lines: list[dict]) -> list[str]:
    """Kills after which anything but the newest whole checkpoint is taken: that of step 6, then the one written."""
    wrong = [f"not killed: {line}" for line in lines if line["code"] != -signal.SIGKILL]
    for written in dict.fromkeys(line["written"] for line in lines):
        group = [line for line in lines if line["written"] == written]
        old, new = (6, [6.0]), (written, [written + 0.5])
        taken = [(line.get("step"), line.get("marks")) for line in group]
        turn = taken.index(new) if new in taken else len(taken) - 1
        expected = [old] * turn + [new] * (len(taken) - turn)
        wrong += [str(line) for line, *pair in zip(group, taken, expected, strict=True) if pair[0] != pair[1]]
    return wrong


@pytest.mark.fault("R6", sample=1, soak=1)
def test_the_newest_sound_one_is_taken_after_a_kill_at_any_point(tmp_path, draw, record_property):
    lines = kills(tmp_path / "checkpoints")
    record_property("points", len(lines))
    assert {line["written"] for line in lines} == {6, 9} and len(lines) > 50
    assert not complaints(lines)


@pytest.mark.parametrize(
    "mechanism",
    [
        pytest.param("in_place", marks=pytest.mark.control("R6", broken="checkpoints written where they stay")),
        pytest.param("unchecked", marks=pytest.mark.control("R6", broken="in place, and read without the manifest")),
        pytest.param("no_mending", marks=pytest.mark.control("R6", broken="what was put aside is not looked for")),
    ],
)
def test_the_kills_find_a_broken_protocol(tmp_path, mechanism):
    assert complaints(kills(tmp_path / "checkpoints", mechanism))


@pytest.mark.fault("R6", sample=1, soak=20)
def test_a_run_killed_in_a_checkpoint_goes_on_bitwise(undisturbed, mpirun, tmp_path, draw):
    save, point = draw.rng.randint(1, 8), draw.rng.randrange(POINTS)
    run_dir = RunDir(tmp_path / "run")
    arguments = (2, "train", undisturbed.config, "--run-dir", run_dir.path)
    ended = mpirun(*arguments, program=[str(HERE / "killing.py"), str(save), str(point)])
    assert ended.returncode != 0 and f"kill -9 in checkpoint {save}" in ended.output, ended.output
    ended = mpirun(*arguments)
    assert ended.returncode == 0, ended.output
    assert not differences(run_dir, undisturbed.run_dir)
