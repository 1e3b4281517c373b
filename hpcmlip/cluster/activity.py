"""Which members of an experiment somebody works on, or will: by Slurm's queue and the processes of this machine.

A member's files say how far it came, not whether anybody still works on it: a job that was killed writes nothing.
"""

import json
import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from hpcmlip.cluster.experiment import Experiment
from hpcmlip.errors import RunError
from hpcmlip.training.rundir import LOCK, holder

WAITING = "waiting"
RUNNING = "running"
_CLOCKS_SECONDS = 5.0
"""By so much may the clocks of this machine and of the file system differ."""


@dataclass(frozen=True)
class Job:
    """A job or array that was submitted."""

    id: str
    kind: str
    """train or evaluate."""
    members: tuple[int, ...]
    submitted: str


@dataclass(frozen=True)
class Event:
    """Something that happened to a member, in its own words."""

    time: float
    """Seconds since 1970."""
    job: str
    """ARRAY_TASK of Slurm, or local-PID@HOST."""
    what: str


@dataclass(frozen=True)
class Activity:
    """What goes on in an experiment now."""

    members: dict[int, str]
    """Member -> waiting or running; nobody works on the absent ones."""
    abandoned: frozenset[int]
    """Absent members that a job or process was to train that is gone. Where it may be at work out of sight, on another
    machine or because Slurm does not answer, a member does not count."""
    jobs: tuple[str, ...]
    """Ids of the jobs in the queue."""
    evaluation: str | None
    """Id of the evaluation in the queue."""


def jobs(experiment: Experiment) -> list[Job]:
    """All jobs submitted for an experiment, oldest first."""
    path = experiment.jobs_file
    try:
        found = json.loads(path.read_text())["jobs"]
        return [Job(job["id"], job["kind"], tuple(job["members"]), job["submitted"]) for job in found]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def events(experiment: Experiment, member: int) -> list[Event]:
    """What happened to a member, oldest first."""
    try:
        lines = experiment.history_file(member).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [Event(_seconds(parts[0]), *parts[1:]) for line in lines if len(parts := line.split(" ", 2)) == 3]


def look(experiment: Experiment, members: Sequence[int], queue: dict[str, str] | None) -> Activity:
    """What goes on for these members; `queue`: what `scheduler.states` says of `jobs`, None where it is not known."""
    submitted = jobs(experiment)
    found, abandoned = {}, set()
    for member in members:
        history = events(experiment, member)
        in_queue = _in_queue(submitted, queue or {}, member)
        here = _is_at_work_here(experiment, member, history)
        is_of_slurm = _is_of_slurm(submitted, member, history)
        if in_queue or here:
            found[member] = in_queue or RUNNING
        elif queue is not None if is_of_slurm else (here is False and _has_begun(experiment, member, history)):
            abandoned.add(member)
    ids = {task.split("_")[0] for task in queue or {}}
    active = [job for job in submitted if job.id in ids]
    evaluation = next((job.id for job in reversed(active) if job.kind == "evaluate"), None)
    return Activity(found, frozenset(abandoned), tuple(job.id for job in active), evaluation)


def _in_queue(submitted: Sequence[Job], queue: dict[str, str], member: int) -> str | None:
    states = [queue[task] for job in submitted if job.kind == "train" and (task := f"{job.id}_{member}") in queue]
    return (WAITING if states[-1] == "PENDING" else RUNNING) if states else None


def _is_of_slurm(submitted: Sequence[Job], member: int, history: Sequence[Event]) -> bool:
    """Whether the last to work on a member was a job."""
    if history:
        return not history[-1].job.startswith("local")
    return any(job.kind == "train" and member in job.members for job in submitted)


def _has_begun(experiment: Experiment, member: int, history: Sequence[Event]) -> bool:
    return bool(history) or holder(experiment.run_dir(member)) is not None


def _is_at_work_here(experiment: Experiment, member: int, history: Sequence[Event]) -> bool | None:
    """Whether a process of this machine works on a member; None if it would be one of another machine, out of sight."""
    lock = experiment.run_dir(member) / LOCK
    claims = [(holder(lock.parent) or "", _changed(lock))]
    if history and history[-1].what == "started":
        # the process that starts it, which is all there is before training has its lock
        claims.append((history[-1].job, history[-1].time))
    answers = [_is_alive(claim, since) for claim, since in claims]
    return True if True in answers else None if None in answers else False


def _is_alive(claim: str, since: float) -> bool | None:
    """Whether the process `... PID on HOST` or `local-PID@HOST` is the one that made this claim, and alive."""
    found = re.match(r"(?:process |local-)(\d+)(?: on |@)([^\s,]+)", claim)
    if found is None:
        return False
    if found[2] != socket.gethostname():
        return None
    try:
        process = psutil.Process(int(found[1]))
        # a later process may have got the same number
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + _CLOCKS_SECONDS
    except psutil.Error:
        return False


def _seconds(time: str) -> float:
    try:
        return datetime.fromisoformat(time).timestamp()
    except ValueError:
        return 0.0


def _changed(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0
