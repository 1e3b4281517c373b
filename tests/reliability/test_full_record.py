"""R7, the log: a full disk under metrics.jsonl ends all ranks with its name, and the run goes on once there is room."""

import math
from pathlib import Path

import pytest
from runs import Ended, RunDir, differences

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

PAGE = 4096


@pytest.fixture
def on_small_disk(many_steps, mpirun, small_disk, tmp_path):
    """`on_small_disk(pages, program=...)` -> (Ended, RunDir, SmallDisk) of the run with so much room for its record."""

    def run(pages: int, **how):
        disk, run_dir = small_disk(tmp_path / "disk"), RunDir(tmp_path / "run")
        disk.fill(pages=pages)
        run_dir.path.mkdir()
        (run_dir.path / "metrics.jsonl").symlink_to(disk.path / "metrics.jsonl")
        return mpirun(2, "train", many_steps.config, "--run-dir", run_dir.path, **how), run_dir, disk

    return run


def wrong(ended: Ended, path: Path) -> list[str]:
    """What is missing of: exit 1, one sentence on each of two ranks that names the path and the bytes."""
    sentences = [line for line in ended.output.splitlines() if line.startswith("hpcmlip: ")]
    found = [f"exit {ended.returncode}"] if ended.returncode != 1 else []
    if len(sentences) != 2 or not all(f"bytes to {path} (No space left on device)" in line for line in sentences):
        found.append(f"said {sentences}")
    return found + (["traceback"] if "Traceback" in ended.output else [])


@pytest.mark.fault("R7", sample=1, soak=5)
def test_a_full_disk_under_the_record_ends_all_ranks(many_steps, on_small_disk, mpirun, draw):
    undisturbed = many_steps.run_dir
    needed = math.ceil((undisturbed.path / "metrics.jsonl").stat().st_size / PAGE)
    pages = draw.rng.randrange(needed)
    print(f"room for {pages} pages of {needed}")
    ended, run_dir, disk = on_small_disk(pages)
    assert not wrong(ended, run_dir.path / "metrics.jsonl"), ended.output
    assert (run_dir.path / "metrics.jsonl").stat().st_size == pages * PAGE, "ended before the disk was full"
    disk.free()
    ended = mpirun(2, "train", many_steps.config, "--run-dir", run_dir.path)
    assert ended.returncode == 0, ended.output
    assert not differences(run_dir, undisturbed)


@pytest.mark.control("R7", broken="nobody is told that the record cannot be written")
def test_a_record_with_a_hole_is_seen(on_small_disk, broken):
    ended, run_dir, _ = on_small_disk(1, program=broken("record"))
    assert wrong(ended, run_dir.path / "metrics.jsonl")
