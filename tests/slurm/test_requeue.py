"""R5: jobs of a real Slurm that come to their time limit, or are queued again while they run, lose nothing."""

import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from experiments import JOB_SECONDS, ONE_PROCESS, TWO_NODES, Submitted, run_yaml, wait_until, write_yaml

from hpcmlip.cluster.site import PACKAGE_FOLDER

pytestmark = [pytest.mark.slurm, pytest.mark.distributed, pytest.mark.timeout(900)]

SAY_START = 'echo "start ${SLURM_RESTART_COUNT:-0}"'
DOCS = Path(__file__).parents[2] / "docs" / "cluster.md"


@dataclass(frozen=True)
class Job:
    """A job or array task, what it trains, and where Slurm writes what it says."""

    id: str
    run: Submitted
    member: str
    log: Path


def problems(queue, job: Job) -> list[str]:
    """What is wrong with a finished job that was queued again at least once; its weights aside."""
    shown = queue.run("scontrol", "show", "job", job.id)
    restarts = int(re.search(r"Restarts=(\d+)", shown)[1])
    found = [] if restarts else ["never queued again"]
    said = re.findall(r"^start (\d+)$", job.log.read_text(), re.MULTILINE)
    if said != [str(i) for i in range(restarts + 1)]:
        found.append(f"log of starts {said} of {restarts + 1}")
    if not (job.run.folder / job.member / "done.json").exists():
        found.append("not finished")
    steps = job.run.steps(job.member)
    if steps != list(range(1, len(steps) + 1)):
        found.append(f"recorded steps {steps}")
    if {name for name, _ in job.run.history(job.member)} - {job.id}:
        found.append("another job trained it")
    return found


def _plain(queue, run: Path, folder: Path) -> Job:
    """The batch script of the documentation, submitted; it says each of its starts besides."""
    text = re.search(r"```bash\n(#!/bin/bash\n.*?)```", DOCS.read_text(), re.DOTALL)[1]
    train = f"{shlex.quote(sys.executable)} -m hpcmlip train {run} --run-dir run"
    text = text.replace("hpcmlip train RUN.yaml", train).replace("\nsrun ", f"\n{SAY_START}\nsrun ")
    # warned at the next look of the controller at the clock, which it takes every 30 s
    text = text.replace("24:00:00", "10").replace("USR2@180", "USR2@60")
    assert train in text and SAY_START in text and "USR2@60" in text
    folder.mkdir()
    (folder / "job.sh").write_text(text)
    number = queue.run("sbatch", "--parsable", "--output=job.out", "job.sh", cwd=folder)
    return Job(number, Submitted(folder), "run", folder / "job.out")


def _array(queue, cli, run: Path, folder: Path, members: int, **site) -> list[Job]:
    file = write_yaml(folder / "site.yaml", TWO_NODES | {"setup": [SAY_START]} | site)
    cli("submit", run, "--members", members, "--site", file, "--run-dir", folder / "e", env=queue.env)
    experiment = Submitted(folder / "e")
    tasks = [f"{experiment.array}_{i}" for i in range(members)]
    return [
        Job(task, experiment, f"member_{i:02d}", experiment.folder / "slurm" / f"train-{task}.out")
        for i, task in enumerate(tasks)
    ]


def _seconds_of_a_member(undisturbed: Submitted) -> float:
    """From its start to its end, alone on the machine."""
    lines = undisturbed.history_file("member_00").read_text().splitlines()
    began, ended = (time.mktime(time.strptime(line.split(" ")[0], "%Y-%m-%dT%H:%M:%SZ")) for line in lines)
    return ended - began


class _Disturbance:
    """What happens to each job, at a moment after its start."""

    def __init__(self, queue, moments: dict[str, tuple[str, float]]):
        self._queue, self._to_come, self._limited = queue, dict(moments), {}
        self._seen: dict[str, float] = {}

    def go_on(self) -> bool:
        """Do what is due; False once all is done or no job is left."""
        states = dict(line.split(" ", 1) for line in self._queue.run(*SQUEUE).splitlines())
        now = time.monotonic()
        for job, (what, moment) in list(self._to_come.items()):
            is_due = states.get(job) == "RUNNING" and now - self._seen.setdefault(job, now) >= moment
            # the script of a plain job does not hear the warning: only a step does
            if is_due and ("_" in job or what == REQUEUED or self._has_step(job)):
                self._act(job, what)
        for job in [job for job in self._limited if states.get(job) == "PENDING"]:
            # the next start has time again
            self._queue.run("scontrol", "update", f"JobId={job}", "TimeLimit=10", check=False)
            del self._limited[job]
        return bool(states) and bool(self._to_come or self._limited)

    def _has_step(self, job: str) -> bool:
        return any("SLURM_PROCID" in process.info["environ"] for process in self._queue.processes(job))

    def _act(self, job: str, what: str) -> None:
        del self._to_come[job]
        if what == REQUEUED:
            self._queue.run("scontrol", "requeue", job)
        else:
            self._queue.run("scontrol", "update", f"JobId={job}", f"EndTime=now+{END_SECONDS[what]}")
            self._limited[job] = what


SQUEUE = ("squeue", "--noheader", "--all", "--array", "--format=%i %T")
WARNED, UNWARNED, REQUEUED = "time limit, warned", "time limit, unwarned", "scontrol requeue"
END_SECONDS = {WARNED: 60, UNWARNED: 1}
"""The controller looks at the clock every 30 s; its next look brings the warning, or TERM where none was asked for."""


@pytest.mark.fault("R5", sample=1, soak=10)
def test_time_limits_and_requeues_change_no_bit(
    queue, cli, ensemble_run, undisturbed_ensemble, tmp_path, draw, record_property
):
    expected = undisturbed_ensemble(2)
    seconds = _seconds_of_a_member(expected)
    limit = draw.rng.choice([WARNED, UNWARNED])
    # CONT means nothing to a shell
    unwarned = {"sbatch_options": ["--signal=B:CONT@1"]} if limit == UNWARNED else {}
    tasks = _array(queue, cli, ensemble_run, tmp_path, 2, warn_seconds=60, **unwarned)
    plain = [_plain(queue, ensemble_run, tmp_path / f"plain{i}") for i in range(2)]
    what = [*draw.rng.sample([limit, REQUEUED], 2), WARNED, REQUEUED]
    what = {job.id: name for job, name in zip((*tasks, *plain), what, strict=True)}
    # four at once take longer than one; a limit comes up to half a minute after it is set
    latest = {REQUEUED: 2 * seconds, WARNED: seconds, UNWARNED: seconds}
    moments = {job: (name, draw.rng.uniform(0, latest[name])) for job, name in what.items()}
    for job, (name, moment) in moments.items():
        print(f"{name} of {job}, {moment:.1f} s after its start")
    disturbance = _Disturbance(queue, moments)
    end = time.monotonic() + JOB_SECONDS
    while disturbance.go_on():
        assert time.monotonic() < end, tasks[0].run.output()
        time.sleep(0.3)
    queue.wait_empty(JOB_SECONDS)
    _nothing_is_left(queue)
    wrong = {job.id: problems(queue, job) for job in (*tasks, *plain)}
    told = "\n".join([tasks[0].run.output(), *(job.log.read_text() for job in plain)])
    # a job that was done before its moment was not disturbed
    unhit = [job.id for job in (*tasks, *plain) if wrong[job.id] == ["never queued again"]]
    assert not [job for job, found in wrong.items() if found and job not in unhit], f"{moments}\n{wrong}\n{told}"
    assert len(unhit) < len(wrong), told
    for job, member in zip((*tasks, *plain), ("member_00", "member_01", "member_00", "member_00"), strict=True):
        assert job.run.weights(job.member) == expected.weights(member), told
    for job in (*tasks, *plain):
        kind = "array task" if job in tasks else "plain job"
        record_property(f"{kind}, {what[job.id]}", "done before" if job.id in unhit else "hit")


def _nothing_is_left(queue) -> None:
    wait_until(lambda: not queue.processes(), 30, lambda: str(queue.processes()))


# -------------------------------------------------------------------------------------------------------- the controls

REQUEUE = 'scontrol requeue "$job"'
BROKEN = {
    "no requeue": lambda text: text.replace(REQUEUE, "true"),
    "another task": lambda text: text.replace(
        REQUEUE, 'scontrol requeue "${SLURM_ARRAY_JOB_ID}_$((1 - SLURM_ARRAY_TASK_ID))"'
    ),
    "truncated log": lambda text: text.replace("@@{directives}", "@@{directives}\n#SBATCH --open-mode=truncate"),
}


@pytest.fixture(scope="module")
def warned(slurm, cli, xtb_store, tmp_path_factory):
    """Of each broken train.sbatch, what `problems` finds after a warning in mid-training; all ran at the same time."""
    slurm.wait_idle(60)
    folder = tmp_path_factory.mktemp("broken")
    run = run_yaml(folder, xtb_store, epochs=30, log_seconds=0.05)
    jobs: dict[str, Sequence[Job]] = {}
    for name, broken in BROKEN.items():
        templates = folder / name / "templates"
        templates.mkdir(parents=True)
        text = (PACKAGE_FOLDER / "train.sbatch").read_text()
        assert broken(text) != text
        (templates / "train.sbatch").write_text(broken(text))
        options = ONE_PROCESS | {"templates": str(templates)}
        jobs[name] = _array(slurm, cli, run, folder / name, 2 if name == "another task" else 1, **options)
    for tasks in jobs.values():
        task = tasks[0]
        wait_until(lambda task=task: task.run.has_begun(task.member), 240, task.run.output)
        slurm.run("scancel", "--batch", "--signal=USR2", task.id)
    slurm.wait_empty(JOB_SECONDS)
    return {name: problems(slurm, tasks[0]) for name, tasks in jobs.items()}


@pytest.mark.parametrize(
    ("mechanism", "seen"),
    [
        pytest.param("no requeue", "never queued again", marks=pytest.mark.control("R5", broken="no requeue")),
        pytest.param(
            "another task", "never queued again", marks=pytest.mark.control("R5", broken="requeue of another task")
        ),
        pytest.param("truncated log", "log of starts", marks=pytest.mark.control("R5", broken="log not appended to")),
    ],
)
def test_the_checks_see_a_broken_script(warned, mechanism, seen):
    assert any(words.startswith(seen) for words in warned[mechanism]), warned[mechanism]
