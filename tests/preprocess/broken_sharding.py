"""`python broken_sharding.py MECHANISM shard ...`: hpcmlip with one mechanism of sharding broken, in workers too.

A worker process imports the program that started it, so what breaks a mechanism is done on import.
"""

import os
import sys
import time
from pathlib import Path


def in_place() -> None:
    """Shards are written under their own names, slowly; the receipt comes first and is believed."""
    import hashlib
    import json

    from hpcmlip.preprocess import arrays, files, write

    def write_slowly(path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(0.05)
            file.write(data[len(data) // 2 :])
        return path

    def run(task) -> int:
        path = task.job.work / task.receipt
        if write._finished(task, path) is None:
            columns, found = write._gather(task), {}
            levels, force_levels = len(task.job.levels), len(task.job.force_levels)
            for spec in arrays.specs(task.group.num_atoms, levels, force_levels, periodic=task.periodic):
                data = write.encode(columns[spec.name], spec, task.group)
                name = f"{task.group.path}/{spec.name}/{spec.shard_key(task.shard)}"
                found[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            receipt = {"files": found, "offsets": write._normal_equations(task, columns)}
            files.write_whole(path, json.dumps(receipt).encode())
            write._write(task, columns)
        return 0

    write.write_temporary, write.run = write_slowly, run
    write.matches = lambda path, expected: True


def receipts() -> None:
    """Receipts of finished shards are not looked at."""
    from hpcmlip.preprocess import write

    write._finished = lambda task, path: None


def full_disk() -> None:
    """What does not fit on the disk is cut short or left out without a word."""
    import contextlib

    from hpcmlip.errors import DataError
    from hpcmlip.preprocess import commit, files, write

    create_arrays = commit.create_arrays

    def create_what_fits(*args, **options) -> None:
        with contextlib.suppress(DataError):
            create_arrays(*args, **options)

    def write_what_fits(path: Path, data: bytes) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            file.write(data)
        return path

    write.write_temporary = files.write_temporary = write_what_fits
    commit.create_arrays = create_what_fits


BROKEN = {function.__name__: function for function in (in_place, receipts, full_disk)}


if __name__ == "__main__":
    os.environ["HPCMLIP_BROKEN"] = sys.argv.pop(1)

BROKEN[os.environ["HPCMLIP_BROKEN"]]()

if __name__ == "__main__":
    from hpcmlip.cli import main

    main()
