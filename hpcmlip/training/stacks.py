"""The end of a rank that hangs, and where each stood: a file a rank, written by a timer that needs no Python to run.

A rank that hangs writes its own stack, those that wait for it write theirs; the file of one that is stopped or gone
stays empty. A run that ends well leaves none. Collectives have a timeout of their own; what else waits for another rank
has none, as torch's store when its host is stopped, and is ended from here.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from hpcmlip.errors import EXIT_FAILED

STACKS = "stacks"
_GRACE_SECONDS = 5.0
"""For a collective to say by itself that it has waited too long."""


class Stacks:
    """While open, the stacks of this process's threads are written if it does not `rearm` for `seconds`.

    A little later the process ends, unless it is `alone`.
    """

    def __init__(self, run_dir: Path, rank: int, *, seconds: float, alone: bool):
        self.folder, self._seconds, self._rank, self._alone = run_dir / STACKS, seconds, rank, alone
        self._closed = threading.Event()
        self._path = self.folder / f"rank_{rank:05d}.txt"

    def __enter__(self) -> "Stacks":
        self.folder.mkdir(exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")  # this job may yet be told that another one works here
        self.rearm()
        if not self._alone:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, _kind, error, _trace) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):  # what goes wrong here costs a file, not the run
            self._file.close()
            if error is None:
                self._path.unlink()
                self.folder.rmdir()  # of the last one to leave

    def clear(self) -> None:
        """Forget what an earlier start left."""
        self._file.truncate(0)

    def rearm(self) -> None:
        self._moved = time.monotonic()
        faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def _watch(self) -> None:
        limit = self._seconds + _GRACE_SECONDS
        while not self._closed.wait(1.0):
            if time.monotonic() - self._moved > limit:
                print(
                    f"hpcmlip: rank {self._rank} has not moved for {limit:.0f} s, more than engine.timeout_minutes: it "
                    f"hangs or waits for one that does; {self.hint}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(EXIT_FAILED)

    @property
    def hint(self) -> str:
        return f"where each stood is in {self.folder} (an empty file: stopped or gone)"

    def add(self, error: BaseException) -> None:
        """Where this rank stood when it gave up."""
        with contextlib.suppress(OSError):  # the disk may be what failed
            traceback.print_exception(error, file=self._file)
            self._file.flush()
