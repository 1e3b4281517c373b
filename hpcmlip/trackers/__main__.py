"""`python -m hpcmlip.trackers KIND SECONDS` reads {run}, {step, time, figures}..., {end} as lines of JSON from stdin.

What cannot go on says so in one sentence on stderr and ends, as it does SECONDS after the end of stdin. Without {end},
the run was killed.
"""

import json
import os
import queue
import signal
import sys
import threading
import time

from hpcmlip import plugins
from hpcmlip.trackers import FAILED, Run

MOST = 200
"""Characters of a library's message that are passed on."""


def main(kind: str, seconds: float) -> None:
    # the signals of a job are for the run, which ends this process by closing the pipe
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    said = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(lines, seconds), daemon=True).start()
    code = 0
    try:
        _follow(kind, lines)
    except (Exception, SystemExit) as error:  # whatever a tracker's library raises, training must not care
        os.write(said, _sentence(kind, error).encode())
        code = 1
    os._exit(code)  # what libraries do at exit may wait for a server


def _read(lines: queue.SimpleQueue, seconds: float) -> None:
    for line in sys.stdin:
        lines.put(line)
    lines.put(None)
    time.sleep(seconds)
    os._exit(1)


def _follow(kind: str, lines: queue.SimpleQueue) -> None:
    run = Run(**json.loads(lines.get()))
    os.chdir(run.folder)
    tracker = plugins.find("trackers", kind).Tracker(run)
    for line in iter(lines.get, None):
        told = json.loads(line)
        if "end" in told:
            tracker.close(told["end"])
            return
        tracker.log(told["step"], told["time"], told["figures"])
    tracker.close(FAILED)


def _sentence(kind: str, error: BaseException) -> str:
    if isinstance(error, ImportError):
        return f"{kind} cannot be imported ({error}): pip install 'hpcmlip[{kind}]'"
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    return first if len(first) <= MOST else first[:MOST] + "..."


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
