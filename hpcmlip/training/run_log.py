"""Where the lines of a run's log go: the terminal and log.txt. Neither can stop the run."""

import contextlib
import logging
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

log = logging.getLogger(__name__)

LOG = "log.txt"
CONSOLE = Console(stderr=True)
"""One for the log and the bars, so that lines appear above the bars."""


class _Lasting:
    """A handler that says once through the others when it cannot write, and tries again with each line."""

    _has_failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            log.warning("cannot write %s (%s); training goes on", self.place, error.strerror)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of lines that could not be written before either
            super().close()


class _File(_Lasting, logging.FileHandler):
    @property
    def place(self) -> str:
        return self.baseFilename


class _Stream(_Lasting, logging.StreamHandler):
    place = "stderr"


class _Terminal(_Lasting, RichHandler):
    place = "the terminal"


def set_up(run_dir: Path, rank: int) -> None:
    """Rank 0 logs to the terminal and to log.txt, the others only what is a warning or worse.

    Raises OSError if nothing at all can be written into `run_dir`.
    """
    root = logging.getLogger("hpcmlip")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    root.propagate = False
    if rank == 0 and sys.stderr.isatty():
        console: logging.Handler = _Terminal(console=CONSOLE, show_path=False)
    else:
        console = _Stream()
        console.setFormatter(logging.Formatter("%(asctime)s %(message)s" if rank == 0 else f"rank {rank}: %(message)s"))
    console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    console.addFilter(lambda record: not getattr(record, "for_the_file", False))
    root.addHandler(console)
    if rank == 0:
        try:
            file = _File(run_dir / LOG, encoding="utf-8")
        except OSError as error:
            if not os.access(run_dir, os.W_OK):
                raise
            log.warning("cannot write %s (%s); training goes on", run_dir / LOG, error.strerror)
            return
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)


def note_failure(error: BaseException) -> None:
    """Leave in log.txt why the run failed; the command line says it on the terminal."""
    log.error("%s", str(error) or type(error).__name__, extra={"for_the_file": True})
