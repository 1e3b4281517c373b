"""Stopped anywhere, then the same command again: the store of an undisturbed run, finished shards left alone.

kill -9 of the real command: test_shard_killed.py."""

import os
from pathlib import Path

import pytest
import raw_files
from in_process import contents, execute, finished_shards, shard
from many_shards import NUM_TASKS

from hpcmlip.config import load
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.preprocess import commit, pipeline, scan
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.job import make


@pytest.fixture
def raw(many_shards):
    return many_shards.config, many_shards.expected


class StoppedError(Exception):
    pass


def stopped_after(count: int):
    """An executor that ends after `count` tasks."""
    left = [count]

    def run(function, tasks, done) -> None:
        for task in tasks:
            if not left[0]:
                raise StoppedError
            left[0] -= 1
            done(task, function(task))

    return run


def partly(config: Path, out: Path, count: int, *overrides: str):
    job = make(load(DataConfig, config, [f"out={out}", *overrides]))
    with pytest.raises(StoppedError):
        pipeline.build(job, stopped_after(count))
    return job


def test_stopped_between_tasks(raw, tmp_path):
    """In the first pass, between the passes, in the second, before the commit; a half-written file lies about."""
    config, expected = raw
    job = make(load(DataConfig, config))
    with job.open(0) as file:
        groups = [file.groups()]
    assert 1 + len(scan.tasks(job, groups)) + len(groups[0]) == NUM_TASKS
    out = tmp_path / "out.zarr"
    for count in (1, 8, NUM_TASKS - 12, NUM_TASKS - 5, NUM_TASKS - 1):
        job = partly(config, out, count)
        assert not out.exists()
    orphan = job.store / "n005" / "pos" / "c" / "0" / "0" / "0.12345.tmp"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"half a shard")
    pipeline.build(job, execute)
    assert contents(out) == expected


def test_what_a_killed_worker_leaves_in_the_second_pass_is_swept(raw, tmp_path):
    config, expected = raw
    job = make(load(DataConfig, config, [f"out={tmp_path / 'out.zarr'}"]))

    def leaving_an_orphan(function, tasks, done) -> None:
        execute(function, tasks, done)
        folder = job.store / "n005" / "pos" / "c" / "0" / "0"
        if folder.is_dir():
            (folder / "0.12345.tmp").write_bytes(b"half a shard")

    pipeline.build(job, leaving_an_orphan)
    assert contents(tmp_path / "out.zarr") == expected


def test_a_damaged_receipt_or_shard_is_made_again(raw, tmp_path):
    config, expected = raw
    out = tmp_path / "out.zarr"
    job = partly(config, out, NUM_TASKS - 4)
    shards = sorted(finished_shards(job.partial))
    (job.store / shards[0]).write_bytes(b"")
    (job.store / shards[-1]).unlink()
    receipts = sorted((job.work / "scan").glob("*.json"))
    receipts[0].write_text("{")
    (job.work / "scan" / "00001.npz").write_bytes(b"short")
    pipeline.build(job, execute)
    assert contents(out) == expected


def test_stopped_between_rename_and_tidying(raw, tmp_path, monkeypatch):
    """The store is there, the building site too: the next run takes the store as it is and tidies."""
    config, expected = raw
    job = make(load(DataConfig, config, [f"out={tmp_path / 'out.zarr'}"]))
    with monkeypatch.context() as patch:
        patch.setattr(commit, "discard", lambda job: (_ for _ in ()).throw(StoppedError))
        with pytest.raises(StoppedError):
            pipeline.build(job, execute)
    assert job.partial.exists()
    pipeline.build(job, execute)
    assert contents(tmp_path / "out.zarr") == expected and not job.partial.exists()


def test_another_config_or_source_starts_anew(raw, tmp_path, caplog):
    config, expected = raw
    out = tmp_path / "out.zarr"
    partly(config, out, NUM_TASKS - 4, "split.seed=1")
    shard(config, f"out={out}")
    assert "starting anew" in caplog.text
    assert contents(out) == expected


def test_a_finished_store_is_left_alone(raw, tmp_path, capsys):
    config, expected = raw
    out = tmp_path / "out.zarr"
    shard(config, f"out={out}")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    capsys.readouterr()
    shard(config, f"out={out}")
    assert "is complete" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ConfigError, match=r"cutoff was 6\.5, is 5\.0.*split\.seed was 0, is 3"):
        shard(config, f"out={out}", "cutoff=5.0", "split.seed=3")
    assert contents(out) == expected


def test_a_finished_store_knows_its_sources(tmp_path):
    raw_files.write_ani1x(tmp_path / "raw.h5")
    config = raw_files.write_config(tmp_path, "raw.h5", "ani1x", split={"by": "structure"})
    shard(config)
    raw_files.write_ani1x(tmp_path / "raw.h5", seed=1)
    with pytest.raises(ConfigError, match=r"raw\.h5 is not the file that .*out\.zarr was sharded from"):
        shard(config)


def test_two_at_once(raw, tmp_path):
    """The second is refused and says who works there; a lock left by a dead process means nothing."""
    config, _ = raw
    job = make(load(DataConfig, config, [f"out={tmp_path / 'out.zarr'}"]))
    with commit.lock(job), pytest.raises(RunError, match=f"another 'hpcmlip shard' works on .*process {os.getpid()}"):
        pipeline.build(job, execute)
    pipeline.build(job, execute)
    assert (tmp_path / "out.zarr").is_dir()
