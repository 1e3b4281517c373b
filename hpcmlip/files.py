"""Files that are on the disk when a function returns, and under their name complete or not at all."""

import os
from pathlib import Path


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8: a kill or a crash leaves the old one or the new one. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary, content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk every byte counts
        raise
    flush(path.parent)


def write(path: Path, content: bytes) -> None:
    """Write a file durably, in place. Raises OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
