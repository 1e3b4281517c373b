"""Shard without workers, in this process: what a test needs that is not about scheduling."""

import json
from pathlib import Path

from hpcmlip.config import load
from hpcmlip.data.store import GroupMeta, Store, open_store
from hpcmlip.preprocess import pipeline
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.job import make


def execute(function, tasks, done) -> None:
    for task in tasks:
        done(task, function(task))


def shard(config: Path, *overrides: str) -> Store:
    """The store of DATA.yaml."""
    job = make(load(DataConfig, config, overrides))
    pipeline.build(job, execute)
    return open_store(job.config.out)


def contents(store: Path) -> dict[str, bytes]:
    """Files of a store."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


def finished_shards(partial: Path) -> dict[str, int]:
    """Shard files that a receipt vouches for -> their modification time."""
    found = {}
    for receipt in partial.glob("work/write/*.json"):
        for name in json.loads(receipt.read_text())["files"]:
            found[name] = (partial / "store" / name).stat().st_mtime_ns
    return found


def rows(store: Store, name: str) -> dict[tuple, object]:
    """(file, group, row) -> value of an array, for all structures."""
    found = {}
    for group in store.meta.groups:
        source = store.read(group, "source", 0, group.rows)
        values = store.read(group, name, 0, group.rows)
        found |= {tuple(key): value for key, value in zip(source.tolist(), values, strict=True)}
    return found


def splits(store: Store) -> dict[tuple, str]:
    """(file, group, row) -> split."""
    return {
        tuple(key): segment.split
        for group in store.meta.groups
        for segment in group.segments
        for key in store.read(group, "source", segment.start, segment.stop).tolist()
    }


def num_chunks(group: GroupMeta) -> int:
    return -(-group.rows // group.rows_per_chunk)
