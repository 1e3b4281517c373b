"""The tracker that a run asked for, at the other end of a pipe (`hpcmlip.trackers`)."""

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from hpcmlip.config import RunConfig, flat
from hpcmlip.trackers import Run
from hpcmlip.training.rundir import fixed

log = logging.getLogger(__name__)


CLOSE_SECONDS = 10.0
"""So long may a tracker take to finish after the end of the run."""
_MOST_BYTES = 2**20
"""Kept for a tracker that does not take them."""


class Tracking:
    """Hands figures to a tracker's process. Never raises and never waits, but for `close`; warns once if it fails."""

    def __init__(self, config: RunConfig, run_dir: Path):
        self._kind = config.track.kind
        self._place = f"with the server {config.track.server}" if config.track.server else f"in {run_dir}"
        self._process: subprocess.Popen | None = None
        self._unsent = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hpcmlip.trackers", self._kind, str(CLOSE_SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            self._warn(str(error))
            return
        os.set_blocking(self._process.stdin.fileno(), False)
        self._send(dataclasses.asdict(describe(config, run_dir)))

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._send({"step": step, "time": round(time.time(), 3), "figures": figures})

    def close(self, end: str) -> None:
        """Let the tracker finish, for a limited time; `end` as in `hpcmlip.trackers`."""
        self._send({"end": end})
        if self._process is None:
            return
        try:
            _, said = self._process.communicate(self._unsent, timeout=CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._give_up(f"it did not finish within {CLOSE_SECONDS:.0f} s, {self._place}")
            return
        if self._process.returncode != 0:
            self._warn(_last_line(said, self._process))

    def _send(self, values: dict) -> None:
        if self._process is None:
            return
        self._unsent += json.dumps(values).encode() + b"\n"
        try:
            # None if the pipe is full: the other end takes lines whatever its tracker waits for, once it runs
            written = self._process.stdin.write(self._unsent) or 0
        except BrokenPipeError:
            _, said = self._process.communicate()
            self._warn(_last_line(said, self._process))
            self._process = None
            return
        self._unsent = self._unsent[written:]
        if len(self._unsent) > _MOST_BYTES:
            self._give_up("it takes no more figures")

    def _give_up(self, reason: str) -> None:
        self._process.kill()
        self._process.communicate()
        self._process = None
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        log.warning("tracking by %s ends: %s; training goes on without it", self._kind, reason)


def describe(config: RunConfig, run_dir: Path) -> Run:
    """What a tracker is told; a run is the same as long as its directory and what may not change in its config are."""
    values, folder = json.loads(config.model_dump_json()), str(run_dir.resolve())
    identity = json.dumps([folder, fixed(values)], sort_keys=True)
    return Run(
        id=hashlib.sha256(identity.encode()).hexdigest()[:16],
        name=run_dir.resolve().name,
        group=config.name,
        project=config.track.project,
        folder=folder,
        server=config.track.server,
        config={"run_dir": folder, **flat(values)},
    )


def _last_line(said: bytes, process: subprocess.Popen) -> str:
    lines = said.decode(errors="replace").splitlines()
    return lines[-1] if lines else f"its process ended with code {process.returncode}"
