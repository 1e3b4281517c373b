"""`hpcmlip status` and `hpcmlip cancel`: what an experiment's files say about its members, and whether somebody works.

Of Slurm the status asks the queue once, and only while members are unfinished; without an answer within a few seconds
it is that of the files, and says so.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hpcmlip.cluster import activity, scheduler, sweep
from hpcmlip.cluster.activity import RUNNING, WAITING, Activity, Event
from hpcmlip.cluster.experiment import Experiment, is_finished, is_pruned, open_experiment, open_single
from hpcmlip.data.inspection import wide_console
from hpcmlip.errors import RunError
from hpcmlip.training.metrics import METRICS
from hpcmlip.training.rundir import FINISHED, PRUNED

QUEUED_AGAIN = "queued again"
LOST = "lost"
NOT_SUBMITTED = "not submitted"
FAILED = "failed"
SPEED_STEPS = 100
"""Steps over which the speed is averaged."""
ANSWER_SECONDS = 10.0
"""A look at files should not wait for a controller that is busy or down."""
LAST_LINES = 10


@dataclass(frozen=True)
class Tail:
    """The end of a file."""

    file: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """One member, from its files."""

    member: str
    state: str
    """not submitted (after a dry run, or if Slurm refused), waiting, running, queued again, stopped, failed, finished,
    pruned, or lost: it has not ended and nobody works on it, as after a job that was killed. Where that cannot be
    known, what was last written, with a growing `quiet_s`."""
    values: dict[str, Any]
    """Dotted key -> value in which it differs from the other members."""
    step: int | None
    epoch: int | None
    epochs: int
    """To be done at most."""
    best: float | None
    """Lowest validation value of the training objective."""
    unit: str | None
    structures_per_s: float | None
    left_s: float | None
    """Seconds to the end of the last epoch; known from the second epoch on."""
    restarts: int
    quiet_s: float | None
    """Seconds since the last sign of life."""
    note: str
    """Why it failed or stopped."""
    log: Tail | None
    """Of a failed or lost member, the end of what its last start wrote."""


def read(experiment: Experiment, *, now: float, queue: dict[str, str] | None = None) -> list[Status]:
    """The status of each member; `now` in seconds since 1970, `queue` as in `activity.look`."""
    members = range(experiment.size)
    going_on = activity.look(experiment, members, queue)
    found = [_member(experiment, i, now, going_on) for i in members]
    if experiment.has_begun() or going_on.members:
        return found
    return [dataclasses.replace(member, state=NOT_SUBMITTED) for member in found]


def show(folder: Path, *, as_json: bool) -> None:
    """Print the status of an experiment, or of a run by itself; raises ConfigError if `folder` holds neither."""
    experiment = open_single(folder) or open_experiment(folder)
    queue = _queue(experiment)
    members = read(experiment, now=time.time(), queue=queue)
    evaluated = experiment.evaluation is not None and experiment.is_evaluated()
    if as_json:
        found = {"members": [dataclasses.asdict(m) for m in members], "evaluated": evaluated}
        print(json.dumps(found | {"slurm_answered": queue is not None}, indent=2))
        return
    table = Table(
        "member",
        "state",
        "step",
        "epoch",
        "best objective",
        "structures/s",
        "time left",
        "restarts",
        "last sign",
        "note",
    )
    for m in members:
        best = "" if m.best is None else f"{m.best:.4g}"
        speed = "" if m.structures_per_s is None else f"{m.structures_per_s:.0f}"
        epoch = "" if m.epoch is None else f"{m.epoch + 1} of {m.epochs}"
        table.add_row(
            *(m.member, m.state, str(m.step or ""), epoch, best, speed),
            *(_duration(m.left_s), str(m.restarts or ""), _duration(m.quiet_s, " ago"), m.note),
        )
    wide_console().print(table)
    for m in members:
        if m.log is not None:
            print(f"{m.member} {m.state}; the end of {m.log.file}:")
            print(*(f"    {line}" for line in m.log.lines), sep="\n")
    if queue is None:
        print("Slurm does not answer: the states are those of the files, and a job that was killed reads as running.")
    best = lowest(members)
    if best is not None:
        print(f"lowest validation objective so far: {best.member}, {best.best:.4g}")
    done, pruned = (sum(m.state == state for m in members) for state in (FINISHED, PRUNED))
    ended = f"{done} of {len(members)} members finished" + (f", {pruned} pruned" if pruned else "")
    print(f"{ended}; {'evaluated' if evaluated else 'not evaluated'}")


def lowest(members: list[Status]) -> Status | None:
    """The trial of a sweep with the lowest validation objective; None of an ensemble, and where the objectives are not
    of the same kind because the sweep changes the loss or the data."""
    keys = {key for member in members for key in member.values} - {sweep.SEED}
    judged = [member for member in members if member.best is not None and member.state != PRUNED]
    if not keys or not judged or any(map(sweep.changes_objective, keys)):
        return None
    return min(judged, key=lambda member: member.best)


def cancel(folder: Path) -> None:
    """Cancel the jobs of an experiment that wait or run; raises ConfigError if `folder` holds none."""
    experiment = open_experiment(folder)
    ids = [job.id for job in activity.jobs(experiment)]
    if ids:
        scheduler.check_present()
    jobs = activity.look(experiment, (), scheduler.states(ids)).jobs
    if not jobs:
        print(f"No job of {experiment.folder} waits or runs.")
        return
    scheduler.cancel(jobs)
    print(f"Cancelled: {', '.join(jobs)}. Members that have begun have a checkpoint; submit --retry goes on.")


def _queue(experiment: Experiment) -> dict[str, str] | None:
    """What Slurm says of the experiment's jobs; None if it is not there or does not answer. Not asked without need."""
    ids = [job.id for job in activity.jobs(experiment)]
    try:
        is_done = not experiment.unfinished()
    except RunError:  # of a damaged member, which the table names
        is_done = False
    if not ids or is_done:
        return {}
    try:
        return scheduler.states(ids, ANSWER_SECONDS)
    except RunError:
        return None


def _member(experiment: Experiment, member: int, now: float, going_on: Activity) -> Status:
    run_dir, config = experiment.run_dir(member), experiment.member_config(member)
    records = _json_lines(run_dir / METRICS)
    steps = [r for r in records if r.get("kind") == "train"]
    validations = [r for r in records if r.get("kind") == "validation" and r.get("objective") is not None]
    history = activity.events(experiment, member)
    best = min(validations, key=lambda r: r["objective"], default={})
    state, note = _state(run_dir, history, has_begun=bool(records))
    state, note = _checked(state, note, member, history, going_on)
    last = steps[-1] if steps else {}
    return Status(
        member=experiment.name(member),
        state=state,
        values=experiment.members[member].values if member < len(experiment.members) else {},
        step=last.get("step"),
        epoch=last.get("epoch"),
        epochs=config.train.epochs,
        best=best.get("objective"),
        unit=best.get("unit"),
        structures_per_s=_mean([r["structures_per_s"] for r in steps[-SPEED_STEPS:]]),
        left_s=_left(steps, config.train.epochs) if state == RUNNING else None,
        restarts=max(0, sum(event.what == "started" for event in history) - 1),
        quiet_s=_quiet(run_dir, experiment.history_file(member), now),
        note=note,
        log=_tail(experiment, member, history) if state in (FAILED, LOST) else None,
    )


def _tail(experiment: Experiment, member: int, history: list[Event]) -> Tail | None:
    """The end of the training's log or, if the last start did not come so far, of what its job wrote."""
    log = experiment.run_dir(member) / "log.txt"
    begun = max((event.time for event in history if event.what == "started"), default=0.0)
    candidates = [log] if log.exists() and log.stat().st_mtime >= begun else []
    candidates += [experiment.output_file(event.job) for event in history[-1:]]
    found = next(((path, lines) for path in candidates if (lines := _lines(path))), None)
    if found is None:
        return None
    path, lines = found
    return Tail(str(path.relative_to(experiment.folder)), tuple(lines[-LAST_LINES:]))


def _state(run_dir: Path, history: list[Event], *, has_begun: bool) -> tuple[str, str]:
    """(state, why) of a member, from its files."""
    try:
        if is_finished(run_dir):
            return FINISHED, ""
        if is_pruned(run_dir):
            return PRUNED, ""
    except RunError as error:
        return FAILED, str(error)
    what = history[-1].what if history else ""
    if what.startswith("failed"):
        return FAILED, _last_error(run_dir) or what
    for word, state in (("requeued", QUEUED_AGAIN), ("stopped", "stopped"), ("started", RUNNING)):
        if what.startswith(word):
            return state, what if state == "stopped" else ""
    return (RUNNING if has_begun else WAITING), ""


def _checked(state: str, note: str, member: int, history: list[Event], going_on: Activity) -> tuple[str, str]:
    """(state, why), put right by who is at work now."""
    if state in (FINISHED, PRUNED):
        return state, note
    found = going_on.members.get(member)
    if found is not None:
        return (QUEUED_AGAIN if found == WAITING and history else found), ""
    if state in (WAITING, QUEUED_AGAIN, RUNNING) and member in going_on.abandoned:
        return LOST, "nobody works on it, and it did not say why; 'hpcmlip submit --retry' goes on"
    return state, note


def _last_error(run_dir: Path) -> str:
    errors = [line for line in _lines(run_dir / "log.txt") if " ERROR " in line]
    return errors[-1] if errors else ""


def _left(steps: list[dict], epochs: int) -> float | None:
    """Seconds to the end if every epoch takes as long as the last whole one, its validation included."""
    begun = {record["epoch"]: record["time"] for record in reversed(steps)}
    last = max(begun, default=0)
    if last - 1 not in begun:
        return None
    remaining = (begun[last] - begun[last - 1]) * (epochs - last)
    return max(0.0, remaining - (steps[-1]["time"] - begun[last]))


def _quiet(run_dir: Path, history: Path, now: float) -> float | None:
    times = [p.stat().st_mtime for p in (history, run_dir / METRICS, run_dir / "log.txt") if p.exists()]
    return max(0.0, now - max(times)) if times else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _json_lines(path: Path) -> list[dict]:
    """Records of a file that may be growing: a last line that is cut off does not count."""
    records = []
    for line in _lines(path):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return []


def _duration(seconds: float | None, tail: str = "") -> str:
    if seconds is None:
        return ""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}{tail}"
    return f"{seconds:.0f} s{tail}"
