"""`hpcmlip submit --local`: one member after another; a failed one leaves the others alone; signals are passed on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.distributed]


@pytest.fixture
def run_yaml(xtb_store, tmp_path) -> Path:
    values = {
        "name": "tiny",
        "data": {"stores": [str(xtb_store)], "levels": {"gfn2": "E"}, "pairs_per_batch": 40000},
        "model": {"kind": "hipnn", "lmax": 0, "features": 4, "interactions": 1, "cutoff": 6.5},
        "train": {"epochs": 1, "micro_batches_per_step": 2, "log_seconds": 0.05},
        "engine": {"device": "cpu"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_broken_member_leaves_the_others_alone(cli, run_yaml, xtb_store, tmp_path):
    folder = tmp_path / "it's an experiment"
    arguments = ["submit", run_yaml, "--members", 2, "--evaluate", xtb_store, "--run-dir", folder, "--local"]
    cli(*arguments, "--dry-run")
    (folder / "member_00" / "config.yaml").write_text((folder / "configs" / "member_01.yaml").read_text())
    (folder / "member_00" / "checkpoints" / "one").mkdir(parents=True)
    done = cli(*arguments, expect=1)
    assert "failed: member_00" in done.stderr and "evaluation" not in done.stderr.splitlines()[-1]
    assert json.loads((folder / "member_01" / "done.json").read_text())["state"] == "finished"
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert [Path(item["run"]).name for item in metrics["left_out"]] == ["member_00"]
    states = json.loads(cli("status", folder, "--json").stdout)
    assert [member["state"] for member in states["members"]] == ["failed", "finished"]
    assert not states["evaluated"]
    # mended and called again: the finished member is left as it is
    written = (folder / "member_01" / "done.json").stat().st_mtime_ns
    (folder / "member_00" / "config.yaml").unlink()
    (folder / "member_00" / "checkpoints" / "one").rmdir()
    cli("submit", "--retry", folder, "--local")
    assert (folder / "member_01" / "done.json").stat().st_mtime_ns == written
    assert len(json.loads((folder / "evaluation" / "metrics.json").read_text())["members"]) == 2
    states = json.loads(cli("status", folder, "--json").stdout)
    assert [member["state"] for member in states["members"]] == ["finished", "finished"]
    assert states["evaluated"] and states["members"][0]["restarts"] == 1
    table = cli("status", folder, env={"COLUMNS": "200"}).stdout
    assert "2 of 2 members finished; evaluated" in table and "member_01" in table
    assert "nothing to do" in cli("submit", "--retry", folder, "--local").stdout


def test_a_killed_trial_of_a_sweep_is_lost_until_it_is_retried(cli, run_yaml, xtb_store, tmp_path):
    folder, sweep = tmp_path / "e", tmp_path / "sweep.yaml"
    sweep.write_text("list: [{optim.lr: 1e-3, train.epochs: 8}, {optim.lr: 5e-4, model.features: 2}]")
    command = ["submit", run_yaml, "--sweep", sweep, "--run-dir", folder, "--local"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcmlip", *map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    names = ["t000-lr0.001-epochs8", "t001-lr0.0005-features2"]
    checkpoints = folder / names[0] / "checkpoints"
    end = time.monotonic() + 120
    while not list(checkpoints.glob("step_*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    (training,) = psutil.Process(process.pid).children()
    training.suspend()  # still at work, yet not done before we have looked
    process.kill()  # the training outlives it
    process.wait()
    assert _states(cli, folder) == dict(zip(names, ["running", "waiting"], strict=True))
    said = cli("submit", "--retry", folder, "--local", "--dry-run").stdout
    assert f"At work, and left alone: {names[0]} (running)." in said and f"{names[1]}.yaml" in said
    training.kill()
    assert _states(cli, folder) == dict(zip(names, ["lost", "waiting"], strict=True))
    cli("submit", "--retry", folder, "--local")
    assert _states(cli, folder) == dict.fromkeys(names, "finished")
    assert "going on from" in (folder / names[0] / "log.txt").read_text()
    said = cli("evaluate", folder, "--data", xtb_store, "--out", tmp_path / "evaluation").stdout
    assert "The members differ in model.features, optim.lr, train.epochs, not in their seed alone" in said
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    assert [Path(member["run"]).name for member in metrics["members"]] == names
    assert metrics["members"][1]["settings"] == {"model.features": 2, "optim.lr": 5e-4, "train.epochs": 1}


def _states(cli, folder: Path) -> dict[str, str]:
    members = json.loads(cli("status", folder, "--json").stdout)["members"]
    return {member["member"]: member["state"] for member in members}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stop_signal_reaches_training_and_the_exit_code_is_75(cli, run_yaml, tmp_path, ranks):
    folder = tmp_path / "stopped"
    command = ["submit", run_yaml, "train.epochs=20", "--run-dir", folder, "--local", "--ranks", ranks]
    process = subprocess.Popen(
        [sys.executable, "-m", "hpcmlip", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = folder / "member_00" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:  # the test itself has a timeout
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "stopped on request" in output and "Traceback" not in output
    assert list((folder / "member_00" / "checkpoints").glob("step_*"))
    cli(*command)
    assert "going on from" in (folder / "member_00" / "log.txt").read_text()
    assert json.loads((folder / "member_00" / "done.json").read_text())["step"] == 60
