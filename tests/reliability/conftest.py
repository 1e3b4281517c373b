"""An undisturbed run to compare with, and hpcmlip with a mechanism broken."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from runs import RunDir

BROKEN = Path(__file__).with_name("broken.py")


@dataclass(frozen=True)
class Undisturbed:
    """A run that nobody disturbed: its config, what it left, how long it took with start-up."""

    config: Path
    run_dir: RunDir
    seconds: float


@pytest.fixture(scope="session")
def undisturbed(write_run, mpirun, tmp_path_factory) -> Undisturbed:
    """Two ranks at ZeRO 1, two epochs of 15 steps, a checkpoint every third step and at each validation."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = write_run(folder)
    return _run(config, mpirun)


@pytest.fixture(scope="session")
def many_steps(write_run, mpirun, tmp_path_factory) -> Undisturbed:
    """Two ranks, some 120 small steps, so that what is told of them fills several pages of a disk."""
    train = {"checkpoint_steps": 25, "log_seconds": 1e-3}
    config = write_run(tmp_path_factory.mktemp("many_steps"), data={"pairs_per_batch": 300}, train=train)
    return _run(config, mpirun)


def _run(config: Path, mpirun) -> Undisturbed:
    ended = mpirun(2, "train", config, "--run-dir", config.parent / "run")
    assert ended.returncode == 0, ended.output
    return Undisturbed(config, RunDir(config.parent / "run"), ended.seconds)


@pytest.fixture(scope="session")
def broken() -> Callable[[str], list[str]]:
    """`broken("moments")` -> the Python program (for `mpirun`) that is hpcmlip with that of broken.py broken."""
    return lambda mechanism: [str(BROKEN), mechanism]


@dataclass(frozen=True)
class SmallDisk:
    """A file system of a few pages in memory."""

    path: Path

    def fill(self, *, pages: int = 0) -> None:
        """Take all room but for so many pages of 4 kB."""
        free = os.statvfs(self.path).f_bavail
        (self.path / "filler").write_bytes(bytes(4096 * (free - pages)))

    def free(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[..., SmallDisk]]:
    """`small_disk(folder, "ro")` -> one of 256 kB mounted there; needs root."""
    mounted = []

    def mount(folder: Path, *options: str) -> SmallDisk:
        folder.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", ",".join(["size=256k", *options]), "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a full disk needs root and the right to mount")
        mounted.append(folder)
        return SmallDisk(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
