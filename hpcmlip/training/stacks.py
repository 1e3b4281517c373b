"""Where each rank stood when a run hung: a file a rank, written by a timer that needs no Python to run.

A rank that hangs writes its own stack, those that wait for it write theirs; the file of one that is stopped or gone
stays empty. A run that ends well leaves none.
"""

import contextlib
import faulthandler
import traceback
from pathlib import Path

STACKS = "stacks"


class Stacks:
    """While open, the stacks of this process's threads are written if it does not `rearm` for `seconds`."""

    def __init__(self, run_dir: Path, rank: int, *, seconds: float):
        self.folder, self._seconds = run_dir / STACKS, seconds
        self._path = self.folder / f"rank_{rank:05d}.txt"

    def __enter__(self) -> "Stacks":
        self.folder.mkdir(exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")  # this job may yet be told that another one works here
        self.rearm()
        return self

    def __exit__(self, _kind, error, _trace) -> None:
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
        faulthandler.dump_traceback_later(self._seconds, file=self._file)

    def add(self, error: BaseException) -> None:
        """Where this rank stood when it gave up."""
        with contextlib.suppress(OSError):  # the disk may be what failed
            traceback.print_exception(error, file=self._file)
            self._file.flush()
