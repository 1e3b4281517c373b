"""Downloads that go on where they stopped: a downloader for pooch, whose own starts a file of 5 GB again each time.

What has arrived lies in a `.part` file; the server is asked for the rest (HTTP Range).
"""

import contextlib
import fcntl
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

import requests
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from hpcmlip.errors import DataError

log = logging.getLogger(__name__)

BLOCK = 1 << 16
FRUITLESS_TRIES = 4
"""A download ends with an error after this many tries in a row that bring no byte."""
LOG_SECONDS = 30


class RefusedError(Exception):
    """An address does not hand the file over."""


@dataclass(frozen=True)
class Resuming:
    """A pooch downloader that keeps what has arrived in `part` and asks for the rest next time."""

    part: Path
    size: int | None
    pause: float

    def __call__(self, url: str, output_file: str, _pooch, check_only: bool = False) -> None:
        """Download `url` to `output_file`; raises RefusedError. What arrived before a failure stays in `part`."""
        with open(self.part, "ab") as part, _alone(part, self.part), _Meter(self.part.name) as meter:
            fruitless = 0
            while True:
                before = part.tell()
                problem = self._try(url, part, meter)
                if problem is None:
                    break
                fruitless = 0 if part.tell() > before else fruitless + 1
                if fruitless == FRUITLESS_TRIES:
                    raise RefusedError(f"{problem}; {part.tell()} bytes are kept in {self.part}")
                log.warning("%s: %s; going on at byte %d", url, problem, part.tell())
                time.sleep(self.pause * 2 ** max(fruitless - 1, 0))
        # a second name, not a move: a kill while the sum is checked must not cost the whole download
        os.unlink(output_file)
        try:
            os.link(self.part, output_file)
        except OSError:  # a file system without hard links
            os.replace(self.part, output_file)

    def _try(self, url: str, part, meter: "_Meter") -> str | None:
        """One request for what is missing; None if the file is whole, else what went wrong."""
        start = part.seek(0, os.SEEK_END)
        # identity: a server that compresses would count the range in compressed bytes
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        try:
            with requests.get(url, headers=headers, stream=True, timeout=(30, 120)) as answer:
                if answer.status_code >= requests.codes.server_error or answer.status_code == requests.codes.too_many:
                    return f"the server answered {answer.status_code} {answer.reason}"
                total = self._accept(answer, start, part)
                meter.begin(total, part.tell())
                if answer.status_code != requests.codes.requested_range_not_satisfiable:
                    for block in answer.iter_content(BLOCK):
                        part.write(block)
                        meter.advance(len(block))
        except requests.RequestException as error:
            part.flush()
            return f"connection failed ({_reason(error)})"
        part.flush()
        missing = (total or part.tell()) - part.tell()
        return f"the connection ended {missing} bytes early" if missing else None

    def _accept(self, answer: requests.Response, start: int, part) -> int | None:
        """Size of the whole file as far as the server tells; empties `part` if the server starts from the beginning."""
        codes = requests.codes
        if answer.status_code == codes.partial_content:
            first, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
            if not first.startswith(f"{start}-"):
                raise RefusedError(f"asked for byte {start} on, the server sent '{first}'")
            return int(total) if total.isdigit() else self.size
        if answer.status_code == codes.requested_range_not_satisfiable:
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(start):
                return start
            part.truncate(0)
            raise RefusedError(f"{start} bytes were there, more than the {total or '?'} of the file; they are removed")
        if answer.status_code != codes.ok:
            raise RefusedError(f"the server answered {answer.status_code} {answer.reason}")
        part.truncate(0)
        part.seek(0)
        length = answer.headers.get("Content-Length", "")
        total = int(length) if length.isdigit() else self.size
        if self.size is not None and total != self.size:
            raise RefusedError(f"the server offers {total} bytes, the file has {self.size}")
        return total


@contextlib.contextmanager
def _alone(part, path: Path):
    """Two commands that write the same file would mix their bytes."""
    try:
        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"another 'hpcmlip fetch' is writing {path}; wait for it") from None
    yield


def _reason(error: Exception) -> str:
    """The innermost cause in words: requests wraps it several times."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error) or type(error).__name__


class _Meter:
    """A bar on a terminal, a line every half minute in a log file."""

    def __init__(self, name: str):
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self.bar = Progress(*columns)
        self.bar.disable = not self.bar.console.is_terminal
        self.task = self.bar.add_task(name.removesuffix(".part"), total=None)
        self.said = time.monotonic()

    def __enter__(self) -> "_Meter":
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def begin(self, total: int | None, done: int) -> None:
        self.bar.update(self.task, total=total, completed=done)

    def advance(self, count: int) -> None:
        self.bar.advance(self.task, count)
        if self.bar.disable and time.monotonic() - self.said > LOG_SECONDS:
            self.said = time.monotonic()
            task = self.bar.tasks[0]
            of = f" of {task.total / 1e6:.0f}" if task.total else ""
            print(f"{task.description}: {task.completed / 1e6:.0f}{of} MB", flush=True)
