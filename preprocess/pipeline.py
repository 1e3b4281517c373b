"""Raw files -> store, in two passes of independent tasks; killed at any moment, it continues where it was.

scan (judge every row) -> layout (pure: from counts to shards) -> write (one task, one shard) -> commit (one rename).
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from hpcmlip.data.store import QUARANTINE, SPLITS, GroupMeta
from hpcmlip.errors import DataError, RunError, StoppedError
from hpcmlip.preprocess import commit, consistency, duplicates, layout, scan, schedule, summary, write
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.files import digest, write_whole
from hpcmlip.preprocess.job import Job, make
from hpcmlip.preprocess.layout import WriteTask
from hpcmlip.preprocess.readers import RawGroup
from hpcmlip.progress import progress

log = logging.getLogger(__name__)

MOST_BAD = 0.01
"""Part of all rows that may be quarantined."""
DENSEST = 1000
"""Bytes of coordinates a byte of a source; deflate packs zeros 1000 times, real coordinates hardly twice."""


def shard(config: DataConfig, *, scheduler: str = "processes", workers: int | None = None) -> None:
    """Build the store of a config, or continue building it; prints a summary.

    Raises ConfigError (config, or `out` is something else), DataError (sources, too many bad rows), RunError (locked).
    """
    began = time.monotonic()
    with schedule.executor(scheduler, workers) as execute:
        if execute is not None:
            build(make(config), execute, began)


def build(job: Job, execute: schedule.Execute, began: float | None = None) -> None:
    """Build the store of a job with the given executor; see `shard`. `began`: when the user started to wait."""
    began = time.monotonic() if began is None else began
    out, console = job.config.out, Console(stderr=True, highlight=False, soft_wrap=True)
    if commit.finished(job):
        commit.tidy(job)
        console.print(f"{out} is complete, nothing to do", markup=False)
        return
    phases: dict[str, float] = {}
    with _timed("listing", phases):
        groups = _list_groups(job)
    try:
        scanned = _build(job, groups, execute, console, phases)
    except OSError as error:
        raise DataError(
            f"cannot write {error.filename or out}: {error.strerror or error}; free space and run again"
        ) from None
    summary.show(
        out,
        unlabelled=scanned.rows - scanned.num_bad - scanned.num_kept,
        seconds=time.monotonic() - began,
        phases=phases,
    )


@contextmanager
def _timed(name: str, phases: dict[str, float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    phases[name] = time.monotonic() - began


def _build(job: Job, groups: list[list[RawGroup]], execute: schedule.Execute, console: Console, phases) -> scan.Scanned:
    with commit.lock(job):
        if job.config.out.exists():
            raise RunError(f"{job.config.out} was finished by another process just now")
        if commit.prepare(job):
            console.print(f"continuing the work in {job.partial}", markup=False)
        with _timed("reading", phases):
            scanned, num_units = _scan(job, groups, execute, console)
        with _timed("writing", phases):
            metas, tasks = _write(job, scanned, execute, console)
        with _timed("finishing", phases):
            bad, repeated = scan.quarantine(job, range(num_units)), duplicates.find(job, num_units)
            commit.commit(job, scanned, metas, tasks, bad, repeated)
            commit.discard(job)
    return scanned


def _list_groups(job: Job) -> list[list[RawGroup]]:
    """Groups of every source; a missing key or file ends the run before work starts."""
    groups = []
    for i, source in enumerate(job.sources):
        with job.open(i) as file:
            groups.append(file.groups())
        claimed = sum(12 * group.rows * group.num_atoms for group in groups[-1])
        if claimed > DENSEST * source.size:
            raise DataError(
                f"the source {source.path} of {source.size:,} bytes claims to hold {claimed:,} bytes of coordinates: "
                "never written, or a file that is made to fill the disk; fetch it again"
            )
    if not any(group.rows for listing in groups for group in listing):
        raise DataError(f"the sources hold no conformation: {', '.join(str(s.path) for s in job.sources)}")
    return groups


@dataclass(frozen=True)
class DigestTask:
    """Hash a source; large files take seconds, so it runs beside the scan."""

    job: Job
    source: int
    cost: int = 0

    def run(self) -> None:
        path = self.job.work / "sources" / f"{self.source:05d}.sha256"
        if not path.is_file():
            write_whole(path, digest(self.job.sources[self.source].path).encode())


def _first_pass(task: DigestTask | scan.ScanTask) -> object:
    return task.run() if isinstance(task, DigestTask) else scan.run(task)


def _scan(job: Job, groups, execute, console: Console) -> tuple[scan.Scanned, int]:
    units = scan.tasks(job, groups)
    watch = _BadRows(job, sum(task.cost for task in units))
    digests = [DigestTask(job, source) for source in range(len(job.sources))]
    _run(_first_pass, [*digests, *units], execute, console, "reading", done=watch)
    _check_digests(job)
    scanned = scan.gather(job, len(units))
    _judge(job, scanned)
    write_whole(job.work / "molecules.json", json.dumps(scanned.molecules).encode())
    return scanned, len(units)


def _check_digests(job: Job) -> None:
    """Raises DataError for a source that is not what the config says."""
    for i, source in enumerate(job.sources):
        found, expected = commit.source_digest(job, i), job.config.sha256.get(source.path.name)
        if expected is not None and found != expected:
            raise DataError(
                f"the source {source.path} has the sha256 {found}, the config expects {expected}: damaged or another "
                "version, fetch it again"
            )


class _BadRows:
    """Counts bad rows as units come in, and raises DataError as soon as they are too many."""

    def __init__(self, job: Job, total: int):
        self.job, self.total, self.bad, self.units = job, total, 0, []
        self.allowed = MOST_BAD * total if job.config.on_bad == "quarantine" else 0

    def __call__(self, task: object, bad: int | None) -> None:
        if not bad:
            return
        self.bad += bad
        self.units.append(task.unit)
        if self.bad > self.allowed:
            bad = list(scan.quarantine(self.job, sorted(self.units)))
            report = self.job.partial / QUARANTINE
            write_whole(report, commit.quarantine_csv(bad))
            examples = "; ".join(
                f"{file} {group} row {row}: {what} ({value})" for file, group, row, what, value in bad[:3]
            )
            why = "more than 1 %" if self.allowed else "on_bad is 'fail'"
            raise DataError(
                f"{self.bad:,} of {self.total:,} conformations are bad so far ({why}), listed in {report}: {examples}; "
                "check elements, min_distance and keys of the config and the units of the sources, or mend the sources"
            )


def _judge(job: Job, scanned: scan.Scanned) -> None:
    """Raises DataError if what was scanned must not become a store."""
    if not scanned.num_kept:
        raise DataError("no conformation carries a label of the levels in the config; check their keys")
    counts = scanned.split_counts()
    for split, fraction in zip(SPLITS, job.config.split.fractions, strict=True):
        if fraction and not counts[split]:
            problem = f"the split '{split}' is empty: too few {job.config.split.by}s for split.fractions"
            if split == "train":
                raise DataError(f"{problem}; take more data or another split.by")
            log.warning(problem)
    consistency.check(job, scanned.sums)


def _write(job: Job, scanned, execute, console: Console) -> tuple[tuple[GroupMeta, ...], list[WriteTask]]:
    groups = layout.groups(job, scanned)
    commit.sweep(job)
    tasks = layout.tasks(job, scanned, groups)
    everything = [ArraysTask(job, groups, scanned.periodic), *tasks]
    _run(_second_pass, everything, execute, console, "writing", done=lambda task, size: None)
    return groups, tasks


@dataclass(frozen=True)
class ArraysTask:
    """Create the arrays of the store, without data; the shards do not wait for it."""

    job: Job
    groups: tuple[GroupMeta, ...]
    periodic: bool
    cost: int = 0

    def run(self) -> None:
        commit.create_arrays(self.job, self.groups, periodic=self.periodic)


def _second_pass(task: ArraysTask | WriteTask) -> object:
    return task.run() if isinstance(task, ArraysTask) else write.run(task)


def _run(
    function, tasks: Sequence, execute: schedule.Execute, console: Console, what: str, *, done: schedule.Done
) -> None:
    def finished(task, receipt) -> None:
        done(task, receipt)
        shown.advance(task.cost)

    with progress(what, sum(task.cost for task in tasks), console) as shown:
        try:
            execute(function, tasks, finished)
        except KeyboardInterrupt:
            raise StoppedError("stopped; the same command continues") from None
