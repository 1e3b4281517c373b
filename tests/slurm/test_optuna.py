"""R12 of a sweep by Optuna on a real Slurm: whatever requeues, cancels and kills its jobs, its results are the same."""

import json
import time
from collections import Counter

import pytest
from experiments import JOB_SECONDS, TWO_NODES, Submitted, run_yaml, wait_until, write_yaml
from faults import inflict
from sweeps import Swept, unlike

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(6 * 3600)]

TRIALS = {True: 20, False: 3}
GENERATION = {True: 4, False: 2}
EPOCHS = {True: 8, False: 3}
FAULTS = {True: 30, False: 2}
PAUSE = {True: 20, False: 8}
"""Seconds at most before each."""


def _sweep(is_soak: bool) -> dict:
    trials, generation = TRIALS[is_soak], GENERATION[is_soak]
    return {
        "optuna": {
            "trials": trials,
            "generation": generation,
            "sampler": {"kind": "TPESampler", "seed": 1, "n_startup_trials": generation},
            "pruner": {"kind": "MedianPruner", "n_startup_trials": 2, "n_warmup_steps": EPOCHS[is_soak] // 2},
            "optim.lr": {"log_uniform": [1.0e-4, 1.0]},
            "model.features": {"integer": [4, 12]},
        }
    }


@pytest.mark.fault("R12", sample=1, soak=1)
def test_a_sweep_ends_as_if_nobody_had_touched_it(queue, cli, xtb_store, tmp_path, draw, record_property):
    run = run_yaml(tmp_path, xtb_store, epochs=EPOCHS[draw.is_soak], log_seconds=0.05)
    sweep, site = write_yaml(tmp_path / "sweep.yaml", _sweep(draw.is_soak)), write_yaml(tmp_path / "s.yaml", TWO_NODES)
    arguments = ["submit", run, "--sweep", sweep, "--evaluate", xtb_store]
    cli(*arguments, "--run-dir", tmp_path / "undisturbed", "--local", "--ranks", 2, timeout=3 * 3600)
    expected = Swept(tmp_path / "undisturbed")

    experiment = Submitted(tmp_path / "experiment")
    began = time.monotonic()
    cli(*arguments, "--run-dir", experiment.folder, "--site", site, env=queue.env)
    faults: Counter[str] = Counter()
    num_trials, num_faults, retries, end = TRIALS[draw.is_soak], FAULTS[draw.is_soak], 0, time.monotonic() + 3 * 3600
    while not _has_ended(cli, queue, experiment):
        assert time.monotonic() < end, experiment.output()
        if not queue.jobs():
            cli("submit", "--retry", experiment.folder, env=queue.env)
            retries += 1
        # spread over the whole sweep
        ended = len(list(experiment.folder.glob("t*/done.json")))
        if faults.total() < num_faults * (ended + 1) / num_trials:
            time.sleep(draw.rng.uniform(0, PAUSE[draw.is_soak]))
            what = inflict(queue, experiment, draw.rng)
            faults.update([what] if what else [])
        else:
            time.sleep(1)
    seconds = time.monotonic() - began
    queue.wait_empty(JOB_SECONDS)
    wait_until(lambda: not queue.processes(), 30, lambda: str(queue.processes()))
    assert not unlike(Swept(experiment.folder), expected), f"{faults}\n{experiment.output()}"
    here, there = (Submitted(swept.folder).metrics() for swept in (Swept(experiment.folder), expected))
    assert (here["levels"], here["ensemble"]) == (there["levels"], there["ensemble"])
    assert faults.total(), "done before the first fault"
    states = Counter(end[0] for end in expected.ends().values())
    record_property("trials", ", ".join(f"{count} {state}" for state, count in sorted(states.items())))
    record_property("faults", ", ".join(f"{count} x {what}" for what, count in sorted(faults.items())))
    record_property(
        "starts of the trials", " ".join(str(experiment.count(name, "started")) for name in expected.runs())
    )
    record_property("retries", retries)
    record_property("seconds", round(seconds))


def _has_ended(cli, queue, experiment: Submitted) -> bool:
    """All trials, and the evaluation is of them."""
    if not (experiment.folder / "evaluation" / "metrics.json").exists():
        return False
    return json.loads(cli("status", experiment.folder, "--json", env=queue.env).stdout)["evaluated"]
