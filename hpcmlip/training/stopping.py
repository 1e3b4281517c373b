"""Requests to stop: a signal or the file STOP sets a flag, which the ranks share at the next step boundary.

Nothing is saved inside a signal handler. The same signal again, a little later, ends the process at once: a little,
because a terminal and torchrun both pass on one Ctrl-C, and other signals do not count, because Slurm follows its
warning with SIGTERM while the checkpoint is being written.
"""

import os
import signal
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE = "STOP"
_IMPATIENT_SECONDS = 2.0


class StopRequests:
    """While open, asks of the listed signals are remembered in `reason` instead of ending the process."""

    def __init__(self, run_dir: Path):
        self._file = run_dir / STOP_FILE
        self._previous: dict[int, object] = {}
        self._first: tuple[int, float] | None = None
        self.reason = ""

    def __enter__(self) -> "StopRequests":
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame) -> None:
        if self._first is None:
            self._first = (number, time.monotonic())
            self.reason = signal.Signals(number).name
        elif number == self._first[0] and time.monotonic() - self._first[1] > _IMPATIENT_SECONDS:
            os._exit(128 + number)

    def is_requested(self, *, look_for_file: bool) -> bool:
        """Has this process been asked to stop? Only one rank need look for the file."""
        if look_for_file and not self.reason and self._file.exists():
            self.reason = f"the file {self._file.name}"
        return bool(self.reason)

    def forget_file(self) -> None:
        """Remove the file, so that the next start is not stopped by it."""
        self._file.unlink(missing_ok=True)
