"""`python audited.py FOLDER ARGUMENTS...`: hpcmlip that leaves a line in FOLDER for each object it unpickles.

Python itself announces (PEP 578) every class or function that a pickle names, by whatever library it is read: a pickle
that names none cannot run anything.
"""

import os
import sys
import traceback
from pathlib import Path


def watch(folder: Path) -> None:
    """From now on; a file a process."""
    with (folder / f"{os.getpid()}").open("w") as file:
        descriptor = os.dup(file.fileno())

    def hook(event: str, arguments: tuple) -> None:
        if event == "pickle.find_class":
            where = " < ".join(f"{f.filename}:{f.lineno}" for f in reversed(traceback.extract_stack()[:-1]))
            os.write(descriptor, f"{'.'.join(arguments)} {where}\n".encode())

    sys.addaudithook(hook)


def found(folder: Path) -> list[str]:
    """What all processes unpickled; raises AssertionError if none was watched."""
    files = list(folder.iterdir())
    assert files, "nothing was watched"
    return [line for file in files for line in file.read_text().splitlines()]


if __name__ == "__main__":
    watch(Path(sys.argv.pop(1)))
    from hpcmlip.cli import main

    main()
