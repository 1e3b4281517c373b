"""Files that are read back after writing, and their entries in a manifest."""

import contextlib
import hashlib
import os
from pathlib import Path

from hpcmlip.errors import DataError
from hpcmlip.files import flush


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a kill leaves the old file or the new one."""
    temporary = write_temporary(path, data)
    flush(temporary)
    os.replace(temporary, path)


def write_temporary(path: Path, data: bytes) -> Path:
    """Write beside `path` and read back; returns the temporary name. Raises DataError if the disk is full or lies."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        if temporary.read_bytes() != data:
            raise DataError(f"{temporary} reads back differently from what was written; check the disk")
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DataError(
            f"cannot write {path} ({len(data)} bytes): {error.strerror}; free space and run again"
        ) from None
    return temporary


def digest(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry(path: Path) -> dict:
    """Manifest entry of a file: its size and sha256."""
    return {"size": path.stat().st_size, "sha256": digest(path)}


def matches(path: Path, expected: dict) -> bool:
    """Is the file there, with the expected size and sha256?"""
    return path.is_file() and path.stat().st_size == expected["size"] and digest(path) == expected["sha256"]
