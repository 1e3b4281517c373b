"""`hpcmlip submit` on a real two-node Slurm: its own scripts, its own training, nobody's hand on it."""

import hashlib
import json
import re
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(600)]

JOB_SECONDS = 400
"""How long a test waits for the queue to become empty before it shows the logs and fails."""

TWO_NODES = {"nodes": 2, "tasks_per_node": 1, "time": "10", "throttle": 2, "warn_seconds": 30}


def _run_yaml(folder: Path, store: Path, **train) -> Path:
    values = {
        "name": "tiny",
        "data": {"stores": [str(store)], "levels": {"gfn1": "EF", "gfn2": "E"}, "pairs_per_batch": 40000},
        "model": {"kind": "hipnn", "lmax": 1, "features": 8, "interactions": 1, "cutoff": 6.5},
        "train": {"epochs": 2, "micro_batches_per_step": 2, "seed": 5} | train,
        "engine": {"device": "cpu"},
    }
    return _yaml(folder / "run.yaml", values)


def _yaml(path: Path, values: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def _weights(experiment: Path, member: int) -> str:
    return hashlib.sha256((experiment / f"member_{member:02d}" / "model.safetensors").read_bytes()).hexdigest()


def _steps(run_dir: Path) -> list[int]:
    path = run_dir / "checkpoints"
    return sorted(int(p.name.removeprefix("step_")) for p in path.glob("step_*")) if path.is_dir() else []


def _output(experiment: Path) -> str:
    return "\n".join(f"== {path}\n{path.read_text()}" for path in sorted((experiment / "slurm").glob("*.out")))


def _finish(queue, experiment: Path) -> str:
    """What the jobs wrote, once the queue is empty."""
    queue.wait_empty(JOB_SECONDS)
    return _output(experiment)


def _wait_until(is_true, seconds: float, what) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, what()
        time.sleep(0.2)


@pytest.fixture(scope="session")
def reference(xtb_store, cli, tmp_path_factory) -> Path:
    """An experiment of two members, trained and evaluated by --local with two processes."""
    folder = tmp_path_factory.mktemp("reference")
    run = _run_yaml(folder, xtb_store)
    arguments = ["--members", 2, "--evaluate", xtb_store, "--run-dir", folder / "local"]
    cli("submit", run, *arguments, "--local", "--ranks", 2, timeout=500)
    return folder / "local"


def test_ensemble_and_evaluation_need_no_hand(queue, cli, xtb_store, reference, tmp_path):
    folder = tmp_path / 'it\'s a "run" $HOME [1]'
    run, site = _run_yaml(folder, xtb_store), _yaml(folder / "site.yaml", TWO_NODES)
    experiment = folder / "an experiment"
    arguments = ["submit", run, "--members", 2, "--evaluate", xtb_store, "--site", site, "--run-dir", experiment]
    said = cli(*arguments, env=queue.env).stdout
    assert re.search(r"Training: array \d+, members 0-1; 0 have finished", said)
    assert re.search(r"Evaluation: job \d+, after all of \d+", said)
    output = _finish(queue, experiment)
    for member in range(2):
        assert _weights(experiment, member) == _weights(reference, member), output
        log = (experiment / f"member_{member:02d}" / "log.txt").read_text()
        assert "2 rank(s) by srun" in log
    assert _weights(experiment, 0) != _weights(experiment, 1)
    here, there = (json.loads((e / "evaluation" / "metrics.json").read_text()) for e in (experiment, reference))
    assert len(here["members"]) == 2
    assert here["levels"] == there["levels"]
    assert here["ensemble"] == there["ensemble"]
    assert (experiment / "evaluation" / "report.html").stat().st_size > 0
    # nothing is left to do, and submitting again does nothing
    again = cli(*arguments, env=queue.env).stdout
    assert "All 2 members" in again and "nothing to do" in again
    assert "nothing to do" in cli("submit", "--retry", experiment, env=queue.env).stdout
    assert not queue.jobs()
    refused = cli("submit", run, "optim.lr=0.1", *arguments[2:], env=queue.env, expect=2)
    assert "optim.lr" in refused.stderr


def test_a_broken_member_leaves_the_others_alone(queue, cli, xtb_store, reference, tmp_path):
    run, site = _run_yaml(tmp_path, xtb_store), _yaml(tmp_path / "site.yaml", TWO_NODES)
    experiment = tmp_path / "experiment"
    arguments = ["submit", run, "--members", 2, "--evaluate", xtb_store, "--site", site, "--run-dir", experiment]
    cli(*arguments, "--dry-run", env=queue.env)
    assert not queue.jobs() and not (experiment / "jobs.json").exists()
    # member 0 finds a run of another config in its place
    foreign = experiment / "member_00" / "config.yaml"
    foreign.write_text((experiment / "configs" / "member_01.yaml").read_text())
    cli(*arguments, env=queue.env)
    busy = cli(*arguments, env=queue.env, expect=1)
    assert "still in the queue" in busy.stderr
    output = _finish(queue, experiment)
    assert "belongs to a run with another config (train.seed" in output
    assert "failed with exit code" in (experiment / "slurm" / "member_00.jobs").read_text()
    assert _weights(experiment, 1) == _weights(reference, 1), output
    metrics = json.loads((experiment / "evaluation" / "metrics.json").read_text())
    assert len(metrics["members"]) == 1
    assert [Path(item["run"]).name for item in metrics["left_out"]] == ["member_00"]
    # mended, and retried from inside a job that has a size of its own: only what is missing runs
    foreign.unlink()
    job = ["srun", "--nodes=1", "--ntasks=1", "--cpus-per-task=3", sys.executable, "-m", "hpcmlip"]
    said = queue.run(*job, "submit", "--retry", str(experiment), timeout=120)
    assert "members 0; 1 have finished already" in said
    assert re.search(r"Evaluation: job \d+, after all of \d+\.", said)
    output = _finish(queue, experiment)
    assert [_weights(experiment, i) for i in range(2)] == [_weights(reference, i) for i in range(2)], output
    assert len(json.loads((experiment / "evaluation" / "metrics.json").read_text())["members"]) == 2
    jobs = json.loads((experiment / "jobs.json").read_text())["jobs"]
    assert [job["members"] for job in jobs if job["kind"] == "train"] == [[0, 1], [0]]


def test_warned_training_saves_queues_again_and_ends_with_the_same_weights(queue, cli, xtb_store, tmp_path):
    run = _run_yaml(tmp_path, xtb_store, epochs=8, log_seconds=0.05)
    site, experiment = _yaml(tmp_path / "site.yaml", TWO_NODES), tmp_path / "experiment"
    cli("submit", run, "--evaluate", xtb_store, "--site", site, "--run-dir", experiment, env=queue.env)
    array = json.loads((experiment / "jobs.json").read_text())["jobs"][0]["id"]
    metrics = experiment / "member_00" / "metrics.jsonl"
    _wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, 120, lambda: _output(experiment))
    queue.run("scancel", "--batch", "--signal=USR2", array)
    output = _finish(queue, experiment)
    history = (experiment / "slurm" / "member_00.jobs").read_text()
    assert [line.split()[2] for line in history.splitlines()] == ["started", "requeued", "started", "finished"], output
    assert {line.split()[1] for line in history.splitlines()} == {f"{array}_0"}
    assert "going on from" in output
    # the evaluation waited for the second start
    evaluation = json.loads((experiment / "evaluation" / "metrics.json").read_text())
    assert len(evaluation["members"]) == 1 and not evaluation["left_out"]
    # each step stands once in the record, and the weights are those of a run that nobody disturbed
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, len(steps) + 1))
    cli("submit", run, "--local", "--ranks", 2, "--run-dir", tmp_path / "undisturbed", timeout=400)
    assert _weights(experiment, 0) == _weights(tmp_path / "undisturbed", 0)


def test_cancelled_training_saves_and_stays_cancelled(queue, cli, xtb_store, tmp_path):
    run, experiment = _run_yaml(tmp_path, xtb_store, epochs=200, log_seconds=0.05), tmp_path / "experiment"
    site = _yaml(tmp_path / "site.yaml", TWO_NODES)
    cli("submit", run, "--evaluate", xtb_store, "--site", site, "--run-dir", experiment, env=queue.env)
    metrics = experiment / "member_00" / "metrics.jsonl"
    _wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, 120, lambda: _output(experiment))
    assert _states(cli, queue, experiment) == {"member_00": "running"}
    said = cli("cancel", experiment, env=queue.env).stdout
    assert re.search(r"Cancelled: \d+, \d+\.", said)
    output = _finish(queue, experiment)
    history = (experiment / "slurm" / "member_00.jobs").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in history] == ["started", "stopped by Slurm"], output
    assert _steps(experiment / "member_00"), output
    assert _states(cli, queue, experiment) == {"member_00": "stopped"}
    assert "No job of" in cli("cancel", experiment, env=queue.env).stdout


def test_warnings_before_the_first_step_queue_again_but_not_for_ever(queue, cli, xtb_store, tmp_path):
    run, experiment = _run_yaml(tmp_path, xtb_store), tmp_path / "experiment"
    cli("submit", run, "--site", _yaml(tmp_path / "site.yaml", TWO_NODES), "--run-dir", experiment, env=queue.env)
    array = json.loads((experiment / "jobs.json").read_text())["jobs"][0]["id"]
    history = experiment / "slurm" / "member_00.jobs"
    for starts in (1, 2):
        _wait_until(lambda n=starts: _count(history, "started") == n, 90, lambda: str(queue.jobs()))
        time.sleep(0.5)
        if starts == 1:  # as if it was not the first time
            with history.open("a") as file:
                file.write(f"2026-01-01T00:00:00Z {array}_0 requeued before the first step\n" * 2)
        queue.run("scancel", "--batch", "--signal=USR2", array)
        _wait_until(lambda n=starts: _count(history, "first step") == 2 + n or "failed" in history.read_text(), 60, str)
    output = _finish(queue, experiment)
    what = [line.split(" ", 2)[2] for line in history.read_text().splitlines()]
    vain = "requeued before the first step"
    assert what[:5] == ["started", vain, vain, vain, "started"], output
    assert what[5].startswith("failed: no step was made in the last four starts") and len(what) == 6
    assert not (experiment / "member_00" / "done.json").exists()


def test_sweep_with_a_failed_a_running_and_a_lost_trial(queue, cli, xtb_store, tmp_path):
    run, experiment = _run_yaml(tmp_path, xtb_store, log_seconds=0.05), tmp_path / "experiment"
    site = _yaml(tmp_path / "site.yaml", TWO_NODES | {"tasks_per_node": 1, "nodes": 1})
    sweep = _yaml(tmp_path / "sweep.yaml", {"list": [{"optim.lr": 1.0e-3}, {"optim.lr": 5.0e-4, "train.epochs": 30}]})
    arguments = ["submit", run, "--sweep", sweep, "--site", site, "--run-dir", experiment]
    cli(*arguments, "--dry-run", env=queue.env)
    short, long = "t000-lr0.001", "t001-lr0.0005-epochs30"
    foreign = experiment / short / "config.yaml"
    foreign.write_text((experiment / "configs" / f"{long}.yaml").read_text())
    cli(*arguments, env=queue.env)
    metrics = experiment / long / "metrics.jsonl"
    failed, begun = experiment / "slurm" / f"{short}.jobs", lambda: metrics.exists() and metrics.stat().st_size > 0
    _wait_until(lambda: _count(failed, "failed") and begun(), 120, lambda: _output(experiment))
    foreign.unlink()
    said = cli("submit", "--retry", experiment, env=queue.env).stdout
    assert f"At work, and left alone: {long} (running)." in said
    assert f"To be trained: {short}." in said and "members 0; 0 have finished" in said
    # nobody is left to say what happened
    array = json.loads((experiment / "jobs.json").read_text())["jobs"][0]["id"]
    for process in psutil.process_iter(["cmdline", "environ"]):
        found = process.info["environ"] or {}
        mine = found.get("SLURM_CONF") == str(queue.conf) and found.get("SLURM_ARRAY_JOB_ID") == array
        if mine and "slurm_script" in " ".join(process.info["cmdline"]):
            process.kill()
    _wait_until(lambda: not any(job.startswith(array) for job in queue.jobs()), 60, lambda: str(queue.jobs()))
    states = _states(cli, queue, experiment)
    assert states[long] == "lost" and states[short] in ("waiting", "queued again", "running", "finished")
    said = cli("submit", "--retry", experiment, env=queue.env).stdout
    assert f"To be trained: {long}." in said
    output = _finish(queue, experiment)
    assert _states(cli, queue, experiment) == {short: "finished", long: "finished"}, output
    assert "going on from" in (experiment / long / "log.txt").read_text()
    jobs = json.loads((experiment / "jobs.json").read_text())["jobs"]
    assert [job["members"] for job in jobs] == [[0, 1], [0], [1]]


def _count(history: Path, what: str) -> int:
    return sum(what in line for line in history.read_text().splitlines()) if history.exists() else 0


def _states(cli, queue, experiment: Path) -> dict[str, str]:
    members = json.loads(cli("status", experiment, "--json", env=queue.env).stdout)["members"]
    return {member["member"]: member["state"] for member in members}


@pytest.mark.parametrize("launch", ["directly", "by srun without its variables"])
def test_tasks_that_each_believe_to_be_the_whole_run_are_refused(queue, xtb_store, tmp_path, launch):
    run = _run_yaml(tmp_path, xtb_store)
    train = f"{sys.executable} -m hpcmlip train {run} --run-dir {tmp_path / 'run'}"
    hide = "srun --ntasks=4 env -u SLURM_PROCID -u SLURM_LOCALID -u SLURM_STEP_ID -u SLURM_STEPID "
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{hide if launch != 'directly' else ''}{train}\n")
    ask = ["--nodes=2", "--ntasks=4", "--output=out.txt"]
    job = queue.run("sbatch", "--parsable", *ask, str(script), cwd=tmp_path)
    queue.wait_empty(JOB_SECONDS)
    assert "ExitCode=1:0" in queue.run("scontrol", "show", "job", job)
    said = (tmp_path / "out.txt").read_text()
    assert re.search("4 tasks or nodes, but this process was not started by srun", said), said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoints").exists()
