"""`hpcmlip submit` on a real two-node Slurm: its own scripts, its own training, nobody's hand on it."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import JOB_SECONDS

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(400)]

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
    cli("submit", run, *arguments, "--local", "--ranks", 2, timeout=300)
    return folder / "local"


def test_ensemble_and_evaluation_need_no_hand(queue, cli, xtb_store, reference, tmp_path):
    folder = tmp_path / "it's a \"run\" $HOME [1]"
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
    assert "All 2 members" in again and "nothing to submit" in again
    assert not queue.jobs()
    refused = cli("submit", run, "optim.lr=0.1", *arguments[2:], env=queue.env, expect=2)
    assert "optim.lr" in refused.stderr
