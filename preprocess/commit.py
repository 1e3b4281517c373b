"""From a folder of shards to a store: lock, identity of the work, metadata, manifest, one rename."""

import contextlib
import csv
import fcntl
import io
import json
import logging
import os
import shutil
import socket
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numcodecs
import numpy as np
import zarr
from zarr.errors import ZarrUserWarning

import hpcmlip
from hpcmlip.data import offsets, store
from hpcmlip.data.store import (
    DUPLICATES,
    DUPLICATES_ATTRIBUTE,
    MANIFEST,
    MOLECULES_SCHEMA,
    QUARANTINE,
    SCHEMA,
    GroupMeta,
    Meta,
    Offsets,
    Source,
)
from hpcmlip.errors import ConfigError, DataError, RunError, UserError
from hpcmlip.files import flush
from hpcmlip.preprocess import arrays
from hpcmlip.preprocess.duplicates import Duplicates
from hpcmlip.preprocess.files import digest, entry, write_whole
from hpcmlip.preprocess.job import Job
from hpcmlip.preprocess.layout import WriteTask
from hpcmlip.preprocess.scan import Scanned

log = logging.getLogger(__name__)

IDENTITY = "hpcmlip_shard"
"""Attribute of the root group: the config that made the store."""


@contextmanager
def lock(job: Job) -> Iterator[None]:
    """Only one process builds a store. The lock goes with the process, however it ends. Raises RunError."""
    try:
        job.partial.mkdir(parents=True, exist_ok=True)
        file = open(job.partial / "lock", "a+")  # noqa: SIM115  (held open while the lock is held)
    except OSError as error:
        raise DataError(f"cannot write into {job.partial.parent}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunError(f"another 'hpcmlip shard' works on {job.config.out} ({file.read().strip()})") from None
        except OSError as error:
            raise DataError(
                f"the file system of {job.partial} has no file locks ({error.strerror}): put 'out' on one that has them"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def discard(job: Job) -> None:
    """Remove the building site."""
    shutil.rmtree(job.partial, ignore_errors=True)


def tidy(job: Job) -> None:
    """Remove a building site that outlived its store, unless somebody is at work there."""
    if job.partial.exists():
        with contextlib.suppress(UserError), lock(job):
            discard(job)


def finished(job: Job) -> bool:
    """Is `out` the finished store of this job? Raises ConfigError if it is something else."""
    out = job.config.out
    if not out.exists():
        return False
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} exists and is no finished store; choose another 'out' or remove it")
    opened = store.open_store(out)
    built = json.loads((out / "zarr.json").read_bytes())["attributes"].get(IDENTITY, {})
    wanted = job.identity()
    changed = [
        f"{key} was {built.get(key)!r}, is {wanted.get(key)!r}"
        for key in sorted(built.keys() | wanted.keys())
        if built.get(key) != wanted.get(key)
    ]
    if changed:
        raise ConfigError(
            f"{out} was sharded with another config ({'; '.join(changed[:5])}); choose another 'out' or remove it"
        )
    for source, known in zip(job.sources, opened.meta.sources, strict=True):
        if source.size != known.size or digest(source.path) != known.sha256:
            raise ConfigError(
                f"{source.path} is not the file that {out} was sharded from; choose another 'out' or remove it"
            )
    return True


def prepare(job: Job) -> bool:
    """Make the building site ready; True if work of an earlier run can be continued."""
    values = {
        "config": job.identity(),
        "sources": [[str(s.path), s.size, s.mtime_ns] for s in job.sources],
        "versions": [SCHEMA, hpcmlip.__version__, zarr.__version__, numcodecs.__version__],
    }
    path = job.work / "identity.json"
    text = json.dumps(values, sort_keys=True)
    begun = job.work.exists() or job.store.exists()
    if path.is_file() and path.read_text() == text:
        return True
    if begun:
        log.warning("%s was begun with another config or other sources: starting anew", job.partial)
        # the identity goes first: what follows must not be trusted if this is cut short
        path.unlink(missing_ok=True)
        shutil.rmtree(job.work, ignore_errors=True)
        shutil.rmtree(job.store, ignore_errors=True)
    write_whole(path, text.encode())
    return False


def sweep(job: Job) -> None:
    """Remove the temporary files that a killed worker, or zarr in it, left behind."""
    for pattern in ("*.tmp", "*.partial"):
        for orphan in job.partial.rglob(pattern):
            orphan.unlink(missing_ok=True)


def create_arrays(job: Job, groups: Iterable[GroupMeta], *, periodic: bool) -> None:
    """Groups and arrays of the store, without data; those that are there stay as they are. Raises DataError."""
    try:
        root = zarr.open_group(job.store, mode="a")
        for group in groups:
            root.require_group(group.path)
            for spec in arrays.specs(group.num_atoms, len(job.levels), len(job.force_levels), periodic=periodic):
                if not (job.store / group.path / spec.name / "zarr.json").is_file():
                    arrays.create(job.store, f"{group.path}/{spec.name}", spec, group, group.rows)
    except OSError as error:  # a write that fails names no file
        raise DataError(
            f"cannot write {error.filename or job.store}: {error.strerror}; free space and run again"
        ) from None


def commit(
    job: Job,
    scanned: Scanned,
    groups: tuple[GroupMeta, ...],
    tasks: list[WriteTask],
    bad: Iterable,
    repeated: Duplicates,
) -> None:
    """Metadata, manifest, and the rename that makes it a store."""
    # a worker that was killed and replaced in this pass may have left some
    sweep(job)
    files, parts = _receipts(job, tasks)
    _check_sources(job)
    molecules = np.array([key.encode() for key in scanned.molecules])
    width = molecules.dtype.itemsize
    arrays.create_molecules(job.store, molecules.view(np.uint8).reshape(-1, width))
    meta = _meta(job, scanned, groups, parts)
    root = zarr.open_group(job.store, mode="r+", zarr_format=3)
    counted = {"structures": repeated.structures, "across_splits": repeated.across_splits}
    root.attrs.put({"hpcmlip": meta.as_json(), IDENTITY: job.identity(), DUPLICATES_ATTRIBUTE: counted})
    with warnings.catch_warnings():
        # consolidated metadata is no part of the v3 specification yet; zarr itself reads it
        warnings.simplefilter("ignore", ZarrUserWarning)
        zarr.consolidate_metadata(job.store)
    write_whole(job.store / QUARANTINE, quarantine_csv(bad))
    write_whole(job.store / DUPLICATES, repeated.as_csv())
    found = dict(sorted((files | _other_files(job, files)).items()))
    manifest = {"digest": store.manifest_digest(found), "files": found}
    write_whole(job.store / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    # journals keep their order: this makes the names below durable too (140 folders one by one took a second)
    flush(job.store)
    os.rename(job.store, job.config.out)
    flush(job.config.out.parent)


def _receipts(job: Job, tasks: list[WriteTask]) -> tuple[dict[str, dict], list[Offsets]]:
    """(files of all tasks, normal equations of each level), added up in the order of groups and shards."""
    files: dict[str, dict] = {}
    sums = [offsets.add([], len(job.elements)) for _ in job.levels]
    for task in sorted(tasks, key=lambda task: (task.group.num_atoms, task.shard)):
        receipt = json.loads((job.work / task.receipt).read_bytes())
        files |= receipt["files"]
        for i, values in enumerate(receipt["offsets"]):
            sums[i] = offsets.add([sums[i], Offsets(*values)], len(job.elements))
    return files, sums


def _check_sources(job: Job) -> None:
    for source in job.sources:
        now = source.path.stat()
        if (now.st_size, now.st_mtime_ns) != (source.size, source.mtime_ns):
            raise DataError(f"the source {source.path} changed while it was read; run again")


def _meta(job: Job, scanned: Scanned, groups: tuple[GroupMeta, ...], sums: list[Offsets]) -> Meta:
    return Meta(
        schema=SCHEMA if scanned.periodic else MOLECULES_SCHEMA,
        name=job.config.name,
        cutoff=job.config.cutoff,
        elements=job.elements,
        levels=job.store_levels(),
        offsets=tuple(sums),
        groups=groups,
        sources=tuple(Source(s.name, s.size, source_digest(job, i)) for i, s in enumerate(job.sources)),
        split=job.config.split.model_dump(mode="json"),
        num_molecules=len(scanned.molecules),
        quarantined=scanned.num_bad,
        periodic=scanned.periodic,
    )


def source_digest(job: Job, source: int) -> str:
    """sha256 of a source, as its task found it."""
    return (job.work / "sources" / f"{source:05d}.sha256").read_text()


def quarantine_csv(bad: Iterable) -> bytes:
    """The report of bad rows, as `scan.quarantine` lists them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "group", "row", "reason", "value"])
    writer.writerows(bad)
    return text.getvalue().encode()


def _other_files(job: Job, known: dict[str, dict]) -> dict[str, dict]:
    """Entries of the files that no task wrote: metadata, molecules, reports."""
    paths = [path for path in job.store.rglob("*") if path.is_file() and path.name != MANIFEST]
    names = {str(path.relative_to(job.store)): path for path in paths}
    return {name: entry(path) for name, path in names.items() if name not in known}
