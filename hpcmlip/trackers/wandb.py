"""Weights & Biases. Offline runs lie in RUN/wandb/, for `wandb sync`."""

import os
import time
from pathlib import Path

import wandb

from hpcmlip.trackers import FINISHED, STOPPED, Run

COMPONENT = "Weights & Biases"


_FOLDER = Path("wandb")
_TAIL_BYTES = 65536
_WRITE_SECONDS = 4.0
"""For what W&B's own process writes when its run is finished already."""


class Tracker:
    """A W&B run that every start of the run continues."""

    def __init__(self, run: Run):
        _FOLDER.mkdir(exist_ok=True)
        if not os.access(_FOLDER, os.W_OK):
            raise OSError(f"cannot write into {_FOLDER.absolute()}")  # W&B would take a temporary folder instead
        self._run = wandb.init(
            mode="offline" if run.server is None else "online",
            dir=".",
            project=run.project,
            group=run.group,
            name=run.name,
            id=run.id,
            resume="allow",
            config=run.config,
            settings=wandb.Settings(
                console="off", silent=True, **({} if run.server is None else {"base_url": run.server})
            ),
        )
        # not W&B's own counter, which cannot go back: steps after a checkpoint are made again, with the same figures
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, time: float, figures: dict[str, float]) -> None:
        self._run.log({"step": step, "time": time, **figures})

    def close(self, end: str) -> None:
        if end == STOPPED:
            self._run.mark_preempting()
        last = f"ended/{end}"
        self._run.summary["end"] = last
        self._run.finish(exit_code=0 if end == FINISHED else 1)
        if self._run.settings.mode == "offline":
            _check_complete(Path(self._run.settings.sync_file), last.encode())


def _check_complete(path: Path, last: bytes) -> None:
    """Raises OSError if W&B does not write what it was given last; of itself it would not say so."""
    deadline = time.monotonic() + _WRITE_SECONDS
    while last not in _tail(path):
        if time.monotonic() > deadline:
            raise OSError(f"{path.absolute()} is not complete: is the disk full?")
        time.sleep(0.1)


def _tail(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return file.read()
