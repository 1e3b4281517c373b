"""Requests to stop: a signal, the file STOP, the near end of the job. The ranks share them at the next step boundary.

Nothing is saved inside a signal handler. The same signal again, a little later, ends the process at once: a little,
because a terminal and torchrun both pass on one Ctrl-C, and other signals do not count, because Slurm follows its
warning with SIGTERM while the checkpoint is being written.
"""

import os
import signal
import time
from collections import deque
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOP_FILE = "STOP"
SLACK_SECONDS = 30.0
"""Of the time before the end of the job: for leaving, and for a first checkpoint, whose time nobody knows yet."""
_IMPATIENT_SECONDS = 2.0
_STEPS_REMEMBERED = 100


class Signals:
    """From `listen` on, the first of SIGNALS is remembered in `first` instead of ending the process.

    The command line begins with it, before the imports that take seconds, and never puts the old handlers back: a
    signal that comes while the process leaves must not turn a finished run into a failed one.
    """

    def __init__(self):
        self.first: signal.Signals | None = None
        self._process = os.getpid()
        self._since = 0.0

    def listen(self) -> "Signals":
        for number in SIGNALS:
            signal.signal(number, self._receive)
        return self

    def ignore(self) -> None:
        """Nothing changes any more how this process ends; the interpreter's end would put the default actions back."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _receive(self, number: int, _frame) -> None:
        if os.getpid() != self._process:
            return  # a forked child: Slurm signals it as well, and its parent decides
        if self.first is None:
            self.first, self._since = signal.Signals(number), time.monotonic()
        elif number == self.first and time.monotonic() - self._since > _IMPATIENT_SECONDS:
            os._exit(128 + number)


class StopRequests:
    """What asks this process to stop; `reason` says it, once `is_requested` found one."""

    def __init__(self, signals: Signals, run_dir: Path, *, seconds_left: float | None = None):
        """`seconds_left`: until the job ends; None if it does not, or nobody knows."""
        self._signals, self._file = signals, run_dir / STOP_FILE
        self._end = None if seconds_left is None else time.monotonic() + seconds_left
        self._steps: deque[float] = deque(maxlen=_STEPS_REMEMBERED)
        self._save = 0.0
        self.reason = ""

    def is_requested(self, *, look_for_file: bool) -> bool:
        """Has this process been asked to stop? Only one rank need look for the file."""
        if not self.reason:
            left = self.seconds_left()
            if self._signals.first is not None:
                self.reason = self._signals.first.name
            elif look_for_file and self._file.exists():
                self.reason = f"the file {self._file.name}"
            elif left is not None and left < margin(max(self._steps, default=0.0), self._save):
                self.reason = f"the job ends in {max(left, 0):.0f} s"
        return bool(self.reason)

    def seconds_left(self) -> float | None:
        """Until the job ends; None if nobody knows."""
        return None if self._end is None else self._end - time.monotonic()

    def took(self, *, step: float = 0.0, save: float = 0.0) -> None:
        """A step, or a checkpoint, took so many seconds."""
        if step:
            self._steps.append(step)
        self._save = max(self._save, save)

    def forget_file(self) -> None:
        """Remove the file, so that the next start is not stopped by it."""
        self._file.unlink(missing_ok=True)


def margin(step: float, save: float) -> float:
    """Seconds before the end of the job at which to stop, where a step and a checkpoint take so long.

    The step that carries the request and one that has just begun are finished first; disks are slower when many jobs
    end together.
    """
    return 2 * step + 3 * save + SLACK_SECONDS
