"""R7, training: a disk that is full while a run writes; all ranks say so, and it goes on from what it had."""

import subprocess
import time
from pathlib import Path

import psutil
import pytest
from runs import Ended, RunDir, differences

from hpcmlip.errors import RunError
from hpcmlip.training import checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SECONDS = 30


class SmallDisk:
    """A file system of 2 MB for a run or its checkpoints; where none can be mounted, a limit on the size of files."""

    def __init__(self, folder: Path):
        self.folder, self.ballast, self.filled_at = folder, folder / "ballast", 0.0
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder]
        self.is_mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0

    def fill(self, ranks: list[psutil.Process]) -> None:
        self.filled_at = time.monotonic()
        if not self.is_mounted:
            ranks[0].rlimit(psutil.RLIMIT_FSIZE, (1000, 1000))
            return
        with self.ballast.open("wb", buffering=0) as file:
            for size in (4096, 1):
                try:
                    while True:
                        file.write(b"\0" * size)
                except OSError:
                    continue

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)

    def remove(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.remove()


@pytest.fixture
def run(mpirun, tmp_path, disk):
    """`run(config, step, program)` -> (RunDir, Ended) of a run whose disk is filled once it has that checkpoint.

    `whole`: the run directory lies on that disk, else only its checkpoints.
    """

    def start(config: Path, step: int, program=("-m", "hpcmlip"), *, whole: bool = False) -> tuple[RunDir, Ended]:
        run_dir = RunDir(tmp_path / "run")
        if whole:
            run_dir.path.symlink_to(disk.folder)
        else:
            run_dir.path.mkdir()
            (run_dir.path / "checkpoints").symlink_to(disk.folder)
        ended = mpirun(
            *(2, "train", config, "--run-dir", run_dir.path),
            when=lambda: any(s >= step for s in run_dir.steps()),
            act=disk.fill,
            program=program,
        )
        return run_dir, ended

    return start


def complaints(ended: Ended, run_dir: RunDir, seconds: float, what: str = "bytes) cannot be written into") -> list[str]:
    """What is wrong about the end of two ranks, so many seconds after the disk was full; `what`: of their sentence."""
    wrong = [] if ended.returncode == 1 else [f"exit code {ended.returncode}"]
    wrong += [f"after {seconds:.0f} s"] if seconds > SECONDS else []
    wrong += ["a traceback"] if "Traceback" in ended.output else []
    said = [line for line in ended.output.splitlines() if line.startswith("hpcmlip: ")]
    told = [line for line in said if what in line]
    wrong += [] if len(told) == 2 else [f"{len(told)} ranks say why"]
    for step in run_dir.steps():
        try:
            checkpoint.read(run_dir.path / "checkpoints" / checkpoint.name(step))
        except RunError as error:
            wrong.append(str(error))
    wrong += [str(path) for path in (run_dir.path / "checkpoints").glob(".tmp*")]
    return wrong + ([] if run_dir.steps() else ["no checkpoint is left"])


@pytest.mark.fault("R7", sample=1, soak=10)
def test_a_full_disk_costs_no_checkpoint(undisturbed, run, mpirun, disk, draw):
    step, whole = draw.rng.choice(range(3, 28, 3)), draw.number % 2 == 1
    print(f"full after step {step}, {'everything' if whole else 'checkpoints'} there")
    run_dir, ended = run(undisturbed.config, step, whole=whole)
    seconds = time.monotonic() - disk.filled_at
    what = ("No space left" if disk.is_mounted else "File too large",) if whole else ()
    assert not complaints(ended, run_dir, seconds, *what), ended.output
    disk.make_room()
    ended = mpirun(2, "train", undisturbed.config, "--run-dir", run_dir.path)
    assert ended.returncode == 0, ended.output
    assert not differences(run_dir, undisturbed.run_dir)


@pytest.mark.control("R7", broken="an error of one rank is not told to the others")
def test_the_check_sees_a_rank_that_is_not_told(undisturbed, run, broken, disk):
    run_dir, ended = run(undisturbed.config, 3, broken("sharing"))
    assert complaints(ended, run_dir, time.monotonic() - disk.filled_at)
