"""R11: a run that goes on with another number of ranks, at another stage: the same structures in each step."""

import json
import signal
from collections import defaultdict
from pathlib import Path

import pytest
from runs import RunDir

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

RECORDING = str(Path(__file__).with_name("recording.py"))
CHANGES = ((2, 1), (2, 3), (3, 2))
SIX = {"train": {"micro_batches_per_step": 6, "checkpoint_steps": 1}}
"""Sections of a RUN.yaml whose steps 1, 2 and 3 ranks can share: two epochs of five."""
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def fixed(write_run, mpirun, tmp_path_factory) -> Path:
    """Folder of a run on two ranks from beginning to end, with what each step saw."""
    folder = tmp_path_factory.mktemp("fixed")
    config = write_run(folder, **SIX)
    ended = mpirun(2, "train", config, "--run-dir", folder / "run", program=[RECORDING, str(folder / "seen")])
    assert ended.returncode == 0, ended.output
    return folder


def seen(folder: Path) -> dict[int, list[tuple]]:
    """Step -> the structures of all ranks in it, sorted."""
    steps = defaultdict(list)
    for path in folder.glob("seen.*"):
        for line in map(json.loads, path.read_text().splitlines()):
            steps[line["step"]] += map(tuple, line["sources"])
    return {step: sorted(sources) for step, sources in steps.items()}


def furthest(found: RunDir, expected: RunDir) -> float:
    """Largest difference of a tensor of weights, relative to its norm."""
    ours, theirs = found.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys() and found.steps()[-1] == expected.steps()[-1]
    pairs = [(ours[name], theirs[name]) for name in theirs if name[0] in ("master", "average")]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in pairs)


@pytest.mark.fault("R11", sample=1, soak=9)
def test_each_step_sees_the_same_structures(fixed, write_run, mpirun, tmp_path, record_property, draw):
    before, after = CHANGES[draw.number % len(CHANGES)]
    stages, step = draw.rng.choices(range(3), k=2), draw.rng.randint(1, 8)
    print(f"{before} ranks at ZeRO {stages[0]} to step {step}, then {after} at ZeRO {stages[1]}")
    config, run_dir = write_run(tmp_path, **SIX), RunDir(tmp_path / "run")
    arguments, program = ("train", config, "--run-dir", run_dir.path), [RECORDING, str(tmp_path / "seen")]
    ended = mpirun(
        *(before, *arguments, f"engine.zero_stage={stages[0]}"),
        when=lambda: any(s >= step for s in run_dir.steps()),
        send=signal.SIGUSR1,
        program=program,
    )
    assert ended.returncode in (0, 75), ended.output
    ended = mpirun(after, *arguments, f"engine.zero_stage={stages[1]}", program=program)
    assert ended.returncode == 0, ended.output
    assert seen(tmp_path) == seen(fixed)
    difference = furthest(run_dir, RunDir(fixed / "run"))
    record_property(f"{before} to {after} ranks, relative difference", f"{difference:.1e}")
    assert difference < TOLERANCE


@pytest.mark.control("R11", broken="a plan that depends on the number of ranks")
def test_the_comparison_sees_another_plan(fixed, write_run, mpirun, tmp_path):
    config, run_dir = write_run(tmp_path, **SIX), RunDir(tmp_path / "run")
    program = [RECORDING, str(tmp_path / "seen"), "plan"]
    ended = mpirun(1, "train", config, "--run-dir", run_dir.path, program=program)
    assert ended.returncode == 0, ended.output
    assert seen(tmp_path) != seen(fixed)
    assert furthest(run_dir, RunDir(fixed / "run")) > TOLERANCE
