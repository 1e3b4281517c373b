"""An undisturbed run to compare with, and hpcmlip with a mechanism broken."""

from collections.abc import Callable
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
    ended = mpirun(2, "train", config, "--run-dir", folder / "run")
    assert ended.returncode == 0, ended.output
    return Undisturbed(config, RunDir(folder / "run"), ended.seconds)


@pytest.fixture(scope="session")
def broken() -> Callable[[str], list[str]]:
    """`broken("moments")` -> the Python program (for `mpirun`) that is hpcmlip with that of broken.py broken."""
    return lambda mechanism: [str(BROKEN), mechanism]
