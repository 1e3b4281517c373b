"""`hpcmlip status`: what a member's files say, complete or cut off in the middle of a line."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from hpcmlip.cluster import status
from hpcmlip.cluster.experiment import Experiment, Member, ensemble
from hpcmlip.config import RunConfig, from_values
from hpcmlip.errors import ConfigError
from hpcmlip.training.rundir import RunDirectory

START = 1_700_000_000.0


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    values = {
        "name": "tiny",
        "data": {"stores": ["s.zarr"], "levels": {"gfn2": "E"}},
        "model": {"kind": "hipnn", "lmax": 0, "features": 4, "interactions": 1, "cutoff": 6.5},
        "train": {"epochs": 10},
    }
    (tmp_path / "slurm").mkdir()
    (tmp_path / "member_00").mkdir()
    config = from_values(RunConfig, values, tmp_path, where="test")
    return Experiment(tmp_path, config, ensemble(config, 1))


def _metrics(folder: Path, epochs: int) -> None:
    """Four steps an epoch, 5 s each, a validation that takes 10 s; the objective is best after the second epoch."""
    lines = []
    for epoch in range(epochs):
        for i in range(4):
            time = START + 30 * epoch + 5 * i
            step = 4 * epoch + i + 1
            record = {"kind": "train", "step": step, "epoch": epoch, "structures_per_s": 10.0 + i, "time": time}
            lines.append(record)
        objective = [9.0, 4.0, None, 6.0][epoch % 4]
        lines.append(
            {"kind": "validation", "step": 4 * epoch + 4, "objective": objective, "unit": "meV", "time": time + 10}
        )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "step": 99, "ep')


def _history(experiment: Experiment, *what: str) -> None:
    text = "".join(f"2026-01-01T00:00:00Z 12_0 {item}\n" for item in what)
    experiment.history_file(0).write_text(text)


def test_a_running_member(experiment):
    _metrics(experiment.run_dir(0), 3)
    _history(experiment, "started", "requeued", "started")
    (member,) = status.read(experiment, now=START)
    assert (member.state, member.step, member.epoch, member.restarts) == ("running", 12, 2, 1)
    assert (member.best, member.unit) == (4.0, "meV")
    assert member.structures_per_s == 11.5
    # the third epoch of ten has lasted 15 of 30 s
    assert member.left_s == 30 * 8 - 15


@pytest.mark.parametrize(
    ("history", "state", "note"),
    [
        ([], "not submitted", ""),
        (["started"], "running", ""),
        (["started", "requeued"], "queued again", ""),
        (["started", "stopped by Slurm"], "stopped", "stopped by Slurm"),
        (["started", "failed with exit code 1"], "failed", "failed with exit code 1"),
        (["started", "failed with exit code 1", "started"], "running", ""),
    ],
)
def test_state_is_what_was_written_last(experiment, history, state, note):
    if history:
        _history(experiment, *history)
    (member,) = status.read(experiment, now=START)
    assert (member.state, member.note) == (state, note)
    assert (member.step, member.best, member.left_s) == (None, None, None)


def test_a_failed_member_shows_its_error(experiment):
    _history(experiment, "started", "failed with exit code 1")
    log = experiment.run_dir(0) / "log.txt"
    log.write_text("2026-11-21 07:00:00,000 INFO step 120, epoch 1.00 of 4\n")
    assert status.read(experiment, now=START)[0].note == "failed with exit code 1"
    # as training leaves it (tests/training/test_failures.py)
    error = "2026-11-21 07:00:01,000 ERROR 11 steps had non-finite numbers"
    log.write_text(f"{log.read_text()}{error}\n\n")
    assert status.read(experiment, now=START)[0].note == error


@pytest.mark.parametrize("state", ["failed", "lost"])
def test_the_end_of_the_log_of_a_failed_member(experiment, state):
    what = ["started", "failed with exit code 1"] if state == "failed" else ["started"]
    queue = {} if state == "lost" else None
    _history(experiment, *what)
    assert status.read(experiment, now=START, queue=queue)[0].log is None
    output = experiment.folder / "slurm" / "train-12_0.out"
    output.write_text("srun: error: n0: task 0: Out Of Memory\n")
    (member,) = status.read(experiment, now=START, queue=queue)
    assert (member.state, member.log) == (
        state,
        status.Tail("slurm/train-12_0.out", ("srun: error: n0: task 0: Out Of Memory",)),
    )
    log = experiment.run_dir(0) / "log.txt"
    log.write_text("".join(f"2026-11-21 INFO step {i}\n" for i in range(20)))
    (member,) = status.read(experiment, now=START, queue=queue)
    assert member.log == status.Tail("member_00/log.txt", tuple(f"2026-11-21 INFO step {i}" for i in range(10, 20)))
    # of an earlier start: the last one did not come so far
    os.utime(log, (START, START))
    assert status.read(experiment, now=START, queue=queue)[0].log.file == "slurm/train-12_0.out"
    _history(experiment, "started")
    assert status.read(experiment, now=START, queue=None)[0].log is None


def test_a_damaged_member_is_not_taken_for_a_silent_slurm(experiment, monkeypatch):
    job = {"id": "12", "kind": "train", "members": [0], "submitted": ""}
    (experiment.folder / "jobs.json").write_text(json.dumps({"jobs": [job]}))
    (experiment.run_dir(0) / "done.json").write_text("{")
    monkeypatch.setattr("hpcmlip.cluster.scheduler.states", lambda jobs, seconds: {"12_0": "RUNNING"})
    assert status._queue(experiment) == {"12_0": "RUNNING"}


def test_the_best_trial_is_that_of_comparable_ones(experiment):
    members = (Member("t000-lr0.1", {"optim.lr": 0.1}), Member("t001-lr0.2", {"optim.lr": 0.2}))
    trials = dataclasses.replace(experiment, members=members)
    for i, epochs in enumerate((1, 3)):
        trials.run_dir(i).mkdir()
        _metrics(trials.run_dir(i), epochs)
    found = status.read(trials, now=START)
    assert [member.best for member in found] == [9.0, 4.0]
    assert found[1].values == {"optim.lr": 0.2} and status.lowest(found).member == "t001-lr0.2"
    weights = [dataclasses.replace(m, values={"loss.weights.gfn2.energy": i}) for i, m in enumerate(found)]
    assert status.lowest(weights) is None
    assert status.lowest(status.read(experiment, now=START)) is None


def test_a_folder_without_experiment_is_refused(tmp_path):
    for act in (lambda: status.show(tmp_path, as_json=False), lambda: status.cancel(tmp_path)):
        with pytest.raises(ConfigError, match=r"no experiment directory: it holds no experiment\.json"):
            act()


def test_a_run_by_itself_and_a_member(experiment, tmp_path, capsys):
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    with RunDirectory(run, experiment.config):
        _metrics(run, 3)
    status.show(run, as_json=True)
    (member,) = json.loads(capsys.readouterr().out)["members"]
    assert (member["member"], member["step"], member["epochs"], member["best"]) == ("mine", 12, 10, 4.0)
    (tmp_path / "runs" / "experiment.json").touch()
    with pytest.raises(ConfigError, match=r"no experiment directory.*; the experiment is .*runs$"):
        status.show(run, as_json=False)
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere"):
        status.show(tmp_path / "nowhere", as_json=False)
