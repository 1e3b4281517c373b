"""`python killing.py SAVE POINT ARGUMENTS...`: hpcmlip, killed by SIGKILL at a point of the writing of a checkpoint.

SAVE counts the checkpoints of this process from 1, POINT the points of one from 0: before, within and after each file,
before each folder that is made, renamed or removed, and the end. What the writing does is seen by Python's audit
hook, so that its order may change without a change here.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable

from hpcmlip import files
from hpcmlip.training import checkpoint

EVENTS = ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "shutil.rmtree")


def at_points(reached: Callable[[int, int, str], None]) -> None:
    """Call `reached(save, point, what)` at each point of each checkpoint that this process writes from now on."""
    save = point = 0
    is_writing = False

    def note(what: str) -> None:
        nonlocal point
        if is_writing and threading.current_thread() is threading.main_thread():
            reached(save, point, what)
            point += 1

    def audit(event: str, arguments: tuple) -> None:
        if is_writing and event in EVENTS:
            note(f"before {event} of {os.path.basename(os.fsdecode(arguments[0]))}")

    original_write, original_prune, write_file = checkpoint.write, checkpoint.prune, files.write

    def write(*arguments):
        nonlocal save, point, is_writing
        save, point, is_writing = save + 1, 0, True
        final = original_write(*arguments)
        note("after the last rename")
        is_writing = False
        return final

    def prune(*arguments, **keywords):
        nonlocal is_writing
        is_writing = True
        original_prune(*arguments, **keywords)
        note("the end")
        is_writing = False

    def in_two_halves(path, content):
        note(f"before {path.name}")
        if is_writing:
            write_file(path, content[: len(content) // 2])
            note(f"within {path.name}")
        write_file(path, content)
        note(f"after {path.name}")

    sys.addaudithook(audit)
    checkpoint.write, checkpoint.prune, files.write = write, prune, in_two_halves


def kill_at(save: int, point: int) -> None:
    def reached(this_save: int, this_point: int, what: str) -> None:
        if (this_save, this_point) == (save, point):
            print(f"kill -9 in checkpoint {save} {what}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    at_points(reached)


if __name__ == "__main__":
    kill_at(int(sys.argv.pop(1)), int(sys.argv.pop(1)))
    from hpcmlip.cli import main

    main()
