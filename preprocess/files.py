"""Files that appear whole or not at all."""

import hashlib
import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, rename: a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Make a file, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
