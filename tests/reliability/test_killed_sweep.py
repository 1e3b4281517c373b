"""R12 of a sweep by Optuna: its worker, or a training, is killed at any moment; the sweep goes on as if nothing was.

Suggestions, ends by the pruner and models are compared with those of a sweep that nobody disturbed.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from sweeps import Swept, unlike

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3600)]

GOOD, BAD = 2.0e-3, 1.0
SWEEP = {
    "optuna": {
        "trials": 3,
        "generation": 2,
        "sampler": {"kind": "TPESampler", "seed": 9, "n_startup_trials": 1},
        "pruner": {"kind": "MedianPruner", "n_startup_trials": 1},
        "optim.lr": {"choice": [GOOD, BAD]},
        "model.features": {"integer": [4, 12]},
    }
}


@pytest.fixture(scope="session")
def sweep_files(write_run, tmp_path_factory) -> tuple[Path, Path]:
    """RUN.yaml, three epochs of 15 steps, and SWEEP.yaml."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    return write_run(folder, train={"epochs": 3}), folder / "sweep.yaml"


@pytest.fixture(scope="session")
def undisturbed_sweep(sweep_files, cli, tmp_path_factory) -> Swept:
    folder = tmp_path_factory.mktemp("undisturbed") / "e"
    began = time.monotonic()
    cli(*_submit(sweep_files, folder), timeout=1500)
    return Swept(folder, time.monotonic() - began)


def _submit(files: tuple[Path, Path], folder: Path) -> list:
    return ["submit", files[0], "--sweep", files[1], "--run-dir", folder, "--local"]


def _kill_one_of(process: subprocess.Popen, rng: random.Random) -> str:
    """kill -9 of the worker, of the training it has started, or of both; which."""
    worker = psutil.Process(process.pid)
    training = worker.children(recursive=True)
    what = rng.choice(["the worker", "the training", "both"])
    # in this order, so that the worker does not start another in between
    victims = [worker] * (what != "the training") + training * (what != "the worker")
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    return what


def _run_disturbed(command: list, folder: Path, seconds: float, rng: random.Random) -> list[str]:
    """Start the sweep, kill twice on the way, start it again until it has ended; what was killed."""
    killed: list[str] = []
    deadline = time.monotonic() + 2400
    while True:
        assert time.monotonic() < deadline, "never came to the end"
        arguments = ["submit", "--retry", folder, "--local"] if (folder / "experiment.json").exists() else command
        process = subprocess.Popen(
            [sys.executable, "-m", "hpcmlip", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            if len(killed) < 2:
                time.sleep(rng.uniform(0, seconds))
                if process.poll() is None:
                    killed.append(_kill_one_of(process, rng))
            said, _ = process.communicate(timeout=1500)
        finally:
            process.kill()
        if process.returncode == 0 and "left alone" not in said:
            return killed
        # a training whose worker was killed goes on alone
        lost = process.returncode in (-signal.SIGKILL, 1, 0)
        assert lost, said
        _wait_for_trainings(folder)


def _wait_for_trainings(folder: Path) -> None:
    mine = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(folder) in " ".join(process.info["cmdline"] or []) and process.pid != os.getpid()
    ]
    _, alive = psutil.wait_procs(mine, timeout=600)
    assert not alive


@pytest.mark.fault("R12", sample=1, soak=5)
def test_a_sweep_survives_the_death_of_worker_and_training(
    sweep_files, undisturbed_sweep, tmp_path, draw, record_property
):
    states = [end[0] for end in undisturbed_sweep.ends().values()]
    assert set(states) == {"finished", "pruned"}, "the sweep prunes a trial"
    folder = tmp_path / "e"
    killed = _run_disturbed(_submit(sweep_files, folder), folder, undisturbed_sweep.seconds / 2, draw.rng)
    print(f"kill -9 of {killed}")
    assert not unlike(Swept(folder), undisturbed_sweep)
    record_property("killed", ", ".join(killed))


def test_the_pruner_ends_what_is_worse_than_the_median_at_that_validation(undisturbed_sweep):
    told, runs = undisturbed_sweep.told(), list(undisturbed_sweep.runs().values())
    first = [reports for _, _, _, reports, _ in told[:2]]
    for number, ((params, state, _, reports, _), run) in enumerate(zip(told, runs, strict=True)):
        judged = [e for e in range(2) if min(list(reports.values())[: e + 1]) > statistics.mean(f[e] for f in first)]
        epochs = judged[0] + 1 if number > 1 and judged else 3
        assert (state, len(reports)) == ("PRUNED" if epochs < 3 else "COMPLETE", epochs), params
        assert len(run.metrics("train")) == 15 * epochs, "it ends at the validation that was judged"


@pytest.mark.control("R12", broken="trials suggested from all results there are")
def test_the_comparison_sees_suggestions_that_depend_on_timing(sweep_files, undisturbed_sweep, broken, tmp_path):
    command = [sys.executable, *broken("all_results"), *map(str, _submit(sweep_files, tmp_path / "e"))]
    subprocess.run(command, check=True, capture_output=True, timeout=1500)
    assert unlike(Swept(tmp_path / "e"), undisturbed_sweep)
