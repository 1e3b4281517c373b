"""`hpcmlip submit` on a real two-node Slurm: its own scripts, its own training, nobody's hand on it."""

import json
import re
import sys
import time
from pathlib import Path

import pytest
from experiments import JOB_SECONDS, TWO_NODES, Submitted, run_yaml, wait_until, write_yaml

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(600)]


def _finish(queue, experiment: Path) -> str:
    """What the jobs wrote, once the queue is empty."""
    queue.wait_empty(JOB_SECONDS)
    return Submitted(experiment).output()


def test_ensemble_and_evaluation_need_no_hand(queue, cli, xtb_store, undisturbed_ensemble, ensemble_run, tmp_path):
    expected = undisturbed_ensemble(2)
    folder = tmp_path / 'it\'s a\n"rün" $HOME [1]'
    site = write_yaml(folder / "site.yaml", TWO_NODES)
    experiment = Submitted(folder / "an experiment")
    arguments = ["submit", ensemble_run, "--members", 2, "--evaluate", xtb_store, "--site", site]
    arguments += ["--run-dir", experiment.folder]
    said = cli(*arguments, env=queue.env).stdout
    assert re.search(r"Training: array \d+, members 0-1; 0 have finished", said)
    assert re.search(r"Evaluation: job \d+, after all of \d+", said)
    busy = cli(*arguments, env=queue.env, expect=1)
    assert "still in the queue" in busy.stderr
    output = _finish(queue, experiment.folder)
    for member in ("member_00", "member_01"):
        assert experiment.weights(member) == expected.weights(member), output
        assert "2 rank(s) by srun" in (experiment.folder / member / "log.txt").read_text()
    assert experiment.weights("member_00") != experiment.weights("member_01")
    here, there = experiment.metrics(), expected.metrics()
    assert len(here["members"]) == 2
    assert here["levels"] == there["levels"]
    assert here["ensemble"] == there["ensemble"]
    assert (experiment.folder / "evaluation" / "report.html").stat().st_size > 0
    # nothing is left to do, and submitting again does nothing
    again = cli(*arguments, env=queue.env).stdout
    assert "All 2 members" in again and "nothing to do" in again
    assert "nothing to do" in cli("submit", "--retry", experiment.folder, env=queue.env).stdout
    assert not queue.jobs()
    refused = cli("submit", ensemble_run, "optim.lr=0.1", *arguments[2:], env=queue.env, expect=2)
    assert "optim.lr" in refused.stderr


def test_cancelled_training_saves_and_stays_cancelled(queue, cli, xtb_store, tmp_path):
    run = run_yaml(tmp_path, xtb_store, epochs=200, log_seconds=0.05)
    site, experiment = write_yaml(tmp_path / "site.yaml", TWO_NODES), Submitted(tmp_path / "experiment")
    cli("submit", run, "--evaluate", xtb_store, "--site", site, "--run-dir", experiment.folder, env=queue.env)
    wait_until(lambda: experiment.has_begun("member_00"), 120, experiment.output)
    assert _states(cli, queue, experiment) == {"member_00": "running"}
    said = cli("cancel", experiment.folder, env=queue.env).stdout
    assert re.search(r"Cancelled: \d+, \d+\.", said)
    output = _finish(queue, experiment.folder)
    assert [what for _, what in experiment.history("member_00")] == ["started", "stopped by Slurm"], output
    assert list((experiment.folder / "member_00" / "checkpoints").glob("step_*")), output
    assert _states(cli, queue, experiment) == {"member_00": "stopped"}
    assert "No job of" in cli("cancel", experiment.folder, env=queue.env).stdout


def test_warnings_before_the_first_step_queue_again_but_not_for_ever(queue, cli, xtb_store, tmp_path):
    run, experiment = run_yaml(tmp_path, xtb_store), Submitted(tmp_path / "experiment")
    # the first warning comes before training starts: nothing of it may be left to run on to the time limit
    site = TWO_NODES | {"setup": ['[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || sleep 3']}
    cli(
        "submit", run, "--site", write_yaml(tmp_path / "site.yaml", site), "--run-dir", experiment.folder, env=queue.env
    )
    array, vain = experiment.array, "requeued before the first step"
    with experiment.history_file("member_00").open("a") as file:  # as if it was not the first time
        file.write(f"2026-01-01T00:00:00Z {array}_0 {vain}\n" * 2)
    wait_until(lambda: any("RUNNING" in job for job in queue.jobs()), 60, lambda: str(queue.jobs()))
    time.sleep(1)
    queue.run("scancel", "--batch", "--signal=USR2", array)
    wait_until(lambda: experiment.count("member_00", vain) == 3, 60, experiment.output)
    assert not (experiment.folder / "member_00" / "log.txt").exists()
    wait_until(lambda: experiment.count("member_00", "started") == 2, 90, lambda: str(queue.jobs()))
    queue.run("scancel", "--batch", "--signal=USR2", array)
    output = _finish(queue, experiment.folder)
    what = [words for _, words in experiment.history("member_00")]
    assert what[:5] == [vain, vain, "started", vain, "started"], output
    assert what[5].startswith("failed: no step was made in the last four starts") and len(what) == 6
    assert not (experiment.folder / "member_00" / "done.json").exists()


def test_a_controller_that_does_not_answer_keeps_nobody_waiting(queue, cli, xtb_store, tmp_path):
    run, experiment = run_yaml(tmp_path, xtb_store), Submitted(tmp_path / "experiment")
    site = write_yaml(tmp_path / "site.yaml", TWO_NODES | {"sbatch_options": ["--hold"]})
    cli("submit", run, "--site", site, "--run-dir", experiment.folder, env=queue.env)
    with queue.silent_controller():
        began = time.monotonic()
        said = cli("status", experiment.folder, env=queue.env, timeout=120).stdout
        assert time.monotonic() - began < 60
    assert "Slurm does not answer: the states are those of the files" in said and "member_00" in said
    queue.run("scancel", experiment.array)


def _states(cli, queue, experiment: Submitted) -> dict[str, str]:
    members = json.loads(cli("status", experiment.folder, "--json", env=queue.env).stdout)["members"]
    return {member["member"]: member["state"] for member in members}


@pytest.mark.parametrize("launch", ["directly", "by srun without its variables"])
def test_tasks_that_each_believe_to_be_the_whole_run_are_refused(queue, xtb_store, tmp_path, launch):
    run = run_yaml(tmp_path, xtb_store)
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
