"""R22: log.txt, TensorBoard or the tracker fail, at the start or in the middle: training goes on, one warning each."""

import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runs import Ended, RunDir, differences

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SIGNS = {"log": "log.txt (", "board": "nothing more for TensorBoard", "tracker": "tracking by "}
"""What warns -> words of its warning."""


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Address of a server that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


class Places:
    """What is wrong with the places that a run writes to, drawn for each."""

    def __init__(self, run_dir: Path, small_disk, rng: random.Random):
        run_dir.mkdir()
        self._run_dir, self._small_disk, self._rng = run_dir, small_disk, rng

    def log(self) -> str:
        path = self._run_dir / "log.txt"
        how = self._rng.choice(["a folder", "a full device", "a full disk"])
        if how == "a folder":
            path.mkdir()
        elif how == "a full device":
            path.symlink_to("/dev/full")
        else:
            self._full(path.with_name("disk"))
            path.symlink_to("disk/log.txt")
        return how

    def board(self) -> str:
        path = self._run_dir / "tensorboard"
        how = self._rng.choice(["a file", "read-only", "a full disk"])
        if how == "a file":
            path.write_text("")
        elif how == "read-only":
            self._small_disk(path, "ro")
        else:
            self._full(path)
        return how

    def tracker(self, kind: str) -> str:
        how = self._rng.choice(["read-only", "a full disk"])
        if kind == "mlflow":  # it has a file, no folder
            (self._run_dir / "mlflow.db").mkdir()
            return "a folder"
        if how == "read-only":
            self._small_disk(self._run_dir / "wandb", "ro")
        else:
            self._full(self._run_dir / "wandb")
        return how

    def _full(self, folder: Path) -> None:
        """Full at once, or in the middle of the run."""
        self._small_disk(folder).fill(pages=self._rng.randrange(4))


def wrong(ended: Ended, run_dir: RunDir, undisturbed: RunDir) -> list[str]:
    """What is missing of: a finished run with the same bits, one warning of each kind, no traceback."""
    if ended.returncode != 0:
        return [f"exit {ended.returncode}"]
    counts = {what: ended.output.count(sign) for what, sign in SIGNS.items()}
    found = differences(run_dir, undisturbed)
    found += [f"{count} warnings of {what}" for what, count in counts.items() if count != 1]
    return found + (["traceback"] if "Traceback" in ended.output else [])


@pytest.fixture
def train(many_steps, mpirun, tmp_path) -> Callable[..., Ended]:
    """`train("track.kind=wandb", ...)` -> Ended of the run with these settings in `tmp_path / "run"`."""

    def run(*settings: str, **how) -> Ended:
        environment = {"WANDB_API_KEY": "0" * 40} | how.pop("env", {})
        arguments = ("train", many_steps.config, *settings)
        return mpirun(2, *arguments, "--run-dir", tmp_path / "run", env=environment, **how)

    return run


@pytest.mark.fault("R22", sample=1, soak=8)
def test_training_goes_on_without_its_log_its_board_and_its_tracker(
    many_steps, train, small_disk, silent_server, closed_port, tmp_path, draw
):
    places, kind = Places(tmp_path / "run", small_disk, draw.rng), draw.rng.choice(["wandb", "mlflow"])
    settings, environment = [f"track.kind={kind}"], {}
    how = draw.rng.choice(["silent", "closed", "package", "place"])
    if how in ("silent", "closed"):
        settings.append(f"track.server={silent_server if how == 'silent' else closed_port}")
    elif how == "package":
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / f"{kind}.py").write_text("raise ImportError('libssl.so.9: cannot open shared object')")
        environment["PYTHONPATH"] = str(tmp_path / "broken") + os.pathsep + os.environ.get("PYTHONPATH", "")
    else:
        how = places.tracker(kind)
    print(f"log.txt: {places.log()}; tensorboard/: {places.board()}; {kind}: {how}")
    ended = train(*settings, env=environment)
    assert not wrong(ended, RunDir(tmp_path / "run"), many_steps.run_dir), ended.output


@pytest.mark.control("R22", broken="errors of TensorBoard's file are not caught")
def test_a_log_that_ends_the_run_is_seen(many_steps, train, broken, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("")
    ended = train(program=broken("board"))
    assert wrong(ended, RunDir(tmp_path / "run"), many_steps.run_dir)
