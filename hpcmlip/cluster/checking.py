"""How `hpcmlip doctor` checks: each check is a function that returns findings; none may hang or end in a traceback."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_LAST_SECONDS = 2.0
OK = "ok"
WARNING = "warning"
ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    state: str
    """ok, warning (some uses suffer) or error (training or submitting would fail)."""
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A check and how long it may take."""

    name: str
    look: Callable[[], list[Finding]]
    seconds: float


@dataclass(frozen=True)
class Answer:
    """What a program said."""

    code: int | None
    """None: it did not end in time, or could not be started."""
    stdout: str
    stderr: str

    @property
    def last_words(self) -> str:
        """Last line of what it said, errors first."""
        lines = (self.stderr.strip() or self.stdout.strip()).splitlines()
        return lines[-1].strip() if lines else "without a word"


def examine(check: Check) -> list[Finding]:
    """What a check finds; an error if it fails or does not answer in time (a file system that hangs, a name server)."""
    found: list[Finding] = []

    def look() -> None:
        try:
            found.extend(check.look())
        except Exception as error:  # a fourth border: what the machine does to a check is a finding itself
            found.append(Finding(check.name, ERROR, f"the check failed: {type(error).__name__}: {error}"))

    # a daemon: a call into a file system that hangs cannot be ended, only left behind
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(check.seconds)
    if thread.is_alive():
        return [Finding(check.name, ERROR, f"no answer within {check.seconds:g} s", "ask who runs this machine")]
    return found


def ask(
    command: Sequence[str], seconds: float, *, env: Mapping[str, str] | None = None, folder: Path | None = None
) -> Answer:
    """Run a program with an end to its time; all that it started ends with it."""
    return ask_together([command], seconds, env=env, folder=folder)[0]


def ask_together(
    commands: Sequence[Sequence[str]],
    seconds: float,
    *,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> list[Answer]:
    """Run programs at the same time, within `seconds` for all of them."""
    deadline = time.monotonic() + seconds
    started = [_start(command, env, folder) for command in commands]
    return [_answer(process, deadline - time.monotonic(), seconds) for process in started]


def _start(command: Sequence[str], env: Mapping[str, str] | None, folder: Path | None) -> subprocess.Popen | str:
    """The process, or why there is none."""
    pipe = subprocess.PIPE
    options = {"text": True, "errors": "replace", "stdin": subprocess.DEVNULL, "stdout": pipe, "stderr": pipe}
    try:
        return subprocess.Popen(command, env=env, cwd=folder, start_new_session=True, **options)
    except OSError as error:
        return str(error)


def _answer(process: subprocess.Popen | str, left: float, seconds: float) -> Answer:
    if isinstance(process, str):
        return Answer(None, "", process)
    try:
        stdout, stderr = process.communicate(timeout=max(0.0, left))
        return Answer(process.returncode, stdout, stderr)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # what left its session keeps the pipes open
            process.communicate(timeout=_LAST_SECONDS)
        return Answer(None, "", f"not done within {seconds:g} s")
