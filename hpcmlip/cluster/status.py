"""`hpcmlip status` and `hpcmlip cancel`: what an experiment's files say about its members.

Nothing is asked of Slurm for the status: it costs the scheduler nothing, and works where there is none.
"""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from hpcmlip.cluster import scheduler
from hpcmlip.cluster.experiment import Experiment, is_finished, open_experiment
from hpcmlip.cluster.submission import job_ids
from hpcmlip.data.inspection import wide_console
from hpcmlip.training.reporting import METRICS

SPEED_STEPS = 100
"""Steps over which the speed is averaged."""


@dataclass(frozen=True)
class Status:
    """One member, from its files."""

    member: str
    state: str
    """waiting, running, queued again, stopped, failed or finished: what was last written. A job that died without a
    word still reads running, with a growing `quiet_s`."""
    step: int | None
    epoch: int | None
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


def read(experiment: Experiment, *, now: float) -> list[Status]:
    """The status of each member; `now` in seconds since 1970."""
    return [_member(experiment, i, now) for i in range(experiment.members)]


def show(folder: Path, *, as_json: bool) -> None:
    """Print the status of an experiment; raises ConfigError if `folder` holds none."""
    experiment = open_experiment(folder)
    members = read(experiment, now=time.time())
    evaluated = experiment.evaluation is not None and experiment.is_evaluated()
    if as_json:
        print(json.dumps({"members": [dataclasses.asdict(m) for m in members], "evaluated": evaluated}, indent=2))
        return
    table = Table(
        "member", "state", "step", "epoch", "best", "structures/s", "time left", "restarts", "last sign", "note"
    )
    for m in members:
        best = "" if m.best is None else f"{m.best:.4g} {m.unit}"
        speed = "" if m.structures_per_s is None else f"{m.structures_per_s:.0f}"
        epoch = "" if m.epoch is None else f"{m.epoch + 1} of {experiment.config.train.epochs}"
        table.add_row(
            *(m.member, m.state, str(m.step or ""), epoch, best, speed),
            *(_duration(m.left_s), str(m.restarts or ""), _duration(m.quiet_s, " ago"), m.note),
        )
    wide_console().print(table)
    done = sum(m.state == "finished" for m in members)
    print(f"{done} of {len(members)} members finished; {'evaluated' if evaluated else 'not evaluated'}")


def cancel(folder: Path) -> None:
    """Cancel the jobs of an experiment that wait or run; raises ConfigError if `folder` holds none."""
    experiment = open_experiment(folder)
    ids = job_ids(experiment)
    if ids:
        scheduler.check_present()
    jobs = scheduler.queued(ids)
    if not jobs:
        print(f"No job of {experiment.folder} waits or runs.")
        return
    scheduler.cancel(jobs)
    print(f"Cancelled: {', '.join(jobs)}. Members that have begun have a checkpoint; submit again to go on.")


def _member(experiment: Experiment, member: int, now: float) -> Status:
    run_dir = experiment.run_dir(member)
    records = _json_lines(run_dir / METRICS)
    steps = [r for r in records if r.get("kind") == "train"]
    validations = [r for r in records if r.get("kind") == "validation" and r.get("objective") is not None]
    history = _lines(experiment.history_file(member))
    best = min(validations, key=lambda r: r["objective"], default={})
    state, note = _state(run_dir, history, has_begun=bool(records))
    last = steps[-1] if steps else {}
    return Status(
        member=experiment.name(member),
        state=state,
        step=last.get("step"),
        epoch=last.get("epoch"),
        best=best.get("objective"),
        unit=best.get("unit"),
        structures_per_s=_mean([r["structures_per_s"] for r in steps[-SPEED_STEPS:]]),
        left_s=_left(steps, experiment.config.train.epochs) if state == "running" else None,
        restarts=max(0, sum(" started" in line for line in history) - 1),
        quiet_s=_quiet(run_dir, experiment.history_file(member), now),
        note=note,
    )


def _state(run_dir: Path, history: list[str], *, has_begun: bool) -> tuple[str, str]:
    """(state, why) from the files; the last line of the history is `time job what`."""
    if is_finished(run_dir):
        return "finished", ""
    what = history[-1].split(" ", 2)[2] if history else ""
    if what.startswith("failed"):
        return "failed", _last_error(run_dir) or what
    for word, state in (("requeued", "queued again"), ("stopped", "stopped"), ("started", "running")):
        if what.startswith(word):
            return state, what if state == "stopped" else ""
    return ("running" if has_begun else "waiting"), ""


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
