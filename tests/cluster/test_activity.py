"""Who works on a member: told by the queue, by the run directory's lock and by the process that started it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpcmlip.cluster import activity, status
from hpcmlip.cluster.experiment import Experiment, ensemble, write
from hpcmlip.config import RunConfig, from_values
from hpcmlip.training.rundir import RunDirectory

HOST = os.uname().nodename


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    """Four members, given to the array 12; member 0 started there, member 1 was queued again, 2 and 3 never began."""
    values = {
        "name": "tiny",
        "data": {"stores": ["s.zarr"], "levels": {"gfn2": "E"}},
        "model": {"kind": "hipnn", "lmax": 0, "features": 4, "interactions": 1, "cutoff": 6.5},
    }
    config = from_values(RunConfig, values, tmp_path, where="test")
    made = Experiment(tmp_path, config, ensemble(config, 4))
    write(made, "")
    _note(made, 0, "12_0", "started")
    _note(made, 1, "12_1", "started", "requeued")
    return made


def _note(experiment: Experiment, member: int, job: str, *what: str) -> None:
    with experiment.history_file(member).open("a") as file:
        file.writelines(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {job} {item}\n" for item in what)


def _submitted(experiment: Experiment, *jobs: dict) -> None:
    (experiment.folder / "jobs.json").write_text(json.dumps({"jobs": [{"submitted": ""} | job for job in jobs]}))


def _array(experiment: Experiment) -> None:
    _submitted(
        experiment,
        {"id": "12", "kind": "train", "members": [0, 1, 2]},
        {"id": "13", "kind": "evaluate", "members": []},
    )


def _states(experiment: Experiment, queue: dict[str, str] | None) -> list[str]:
    return [member.state for member in status.read(experiment, now=time.time(), queue=queue)]


def test_the_queue_has_the_word(experiment):
    _array(experiment)
    queue = {"12_0": "RUNNING", "12_1": "PENDING", "12_2": "PENDING", "13": "PENDING"}
    assert _states(experiment, queue) == ["running", "queued again", "waiting", "waiting"]
    found = activity.look(experiment, range(4), queue)
    assert found.members == {0: "running", 1: "waiting", 2: "waiting"}
    assert found.jobs == ("12", "13") and found.evaluation == "13"
    # what Slurm itself queued again after a node failed reads so too
    assert _states(experiment, queue | {"12_0": "PENDING"})[0] == "queued again"


def test_members_whose_jobs_are_gone_are_lost(experiment):
    _array(experiment)
    # member 3 was never submitted
    assert _states(experiment, {}) == ["lost", "lost", "lost", "waiting"]
    assert "--retry" in status.read(experiment, now=time.time(), queue={})[0].note
    _note(experiment, 0, "12_0", "failed with exit code 1")
    _note(experiment, 1, "12_1", "stopped by Slurm")
    assert _states(experiment, {}) == ["failed", "stopped", "lost", "waiting"]
    assert _states(experiment, {"12_0": "PENDING"})[0] == "queued again"


def test_without_an_answer_of_slurm_the_files_have_the_word(experiment):
    _array(experiment)
    assert _states(experiment, None) == ["running", "queued again", "waiting", "waiting"]


def test_a_later_job_counts(experiment):
    _submitted(
        experiment,
        {"id": "12", "kind": "train", "members": [0, 1, 2]},
        {"id": "14", "kind": "train", "members": [0]},
    )
    assert activity.look(experiment, range(4), {"14_0": "PENDING"}).members == {0: "waiting"}


def test_a_process_of_this_machine_is_seen_and_missed(experiment):
    code = f"""
import sys, time
from pathlib import Path
from hpcmlip.config import RunConfig, load
from hpcmlip.training.rundir import RunDirectory
config = load(RunConfig, {str(experiment.config_file(3))!r})
with RunDirectory(Path({str(experiment.run_dir(3))!r}), config):
    print("in", flush=True)
    time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        assert _states(experiment, {})[3] == "running"
    finally:
        process.send_signal(signal.SIGKILL)
    # not yet waited for: a zombie is no process at work
    deadline = time.monotonic() + 30
    while _states(experiment, {})[3] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _states(experiment, {})[3] == "lost"
    process.wait()
    process.stdout.close()
    assert _states(experiment, {})[3] == "lost"


def test_a_number_that_another_process_has_by_now_does_not_count(experiment):
    with RunDirectory(experiment.run_dir(3), experiment.member_config(3)):
        pass
    lock = experiment.run_dir(3) / ".lock"
    assert str(os.getpid()) in lock.read_text()
    assert _states(experiment, {})[3] == "running", "this process lives"
    os.utime(lock, (0, 0))  # claimed long before this process began
    assert _states(experiment, {})[3] == "lost"


def test_the_starter_counts_before_there_is_a_lock(experiment):
    _note(experiment, 2, f"local-{os.getpid()}@{HOST}", "started")
    assert _states(experiment, {})[2] == "running"
    _note(experiment, 2, f"local-{os.getpid()}@{HOST}", "failed with exit code 1")
    assert _states(experiment, {})[2] == "failed", "the starter goes on with other members"
    _note(experiment, 3, f"local-{os.getpid()}@elsewhere", "started")
    assert _states(experiment, {})[3] == "running", "what another machine does cannot be seen"


@pytest.mark.parametrize("text", ["", "{", '{"jobs": [{"id": "1"}]}'])
def test_a_damaged_list_of_jobs_is_named(experiment, text):
    path: Path = experiment.folder / "jobs.json"
    path.write_text(text)
    with pytest.raises(Exception, match=r"jobs\.json cannot be read"):
        activity.jobs(experiment)
