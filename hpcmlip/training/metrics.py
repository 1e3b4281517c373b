"""metrics.jsonl, the record of a run: a line a step and a validation, each once, however often the run was started."""

import json
import math
import os
import time
from pathlib import Path

from hpcmlip.errors import RunError
from hpcmlip.files import write_atomic

METRICS = "metrics.jsonl"


class MetricsFile:
    """Appends to the record. What fails is kept in `failure`, so that all ranks can end together."""

    def __init__(self, path: Path):
        self.failure: str | None = None
        self._path, self._lines, self._file = path, [], None
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            self._fail(error)

    def add(self, **values) -> None:
        """A line more, on the disk at the next `flush`."""
        values["time"] = round(time.time(), 3)
        self._lines.append(json.dumps(finite(values), allow_nan=False) + "\n")

    def flush(self) -> None:
        """Bring all lines to the disk."""
        data = "".join(self._lines).encode()
        self._lines.clear()
        if self.failure is not None or not data:
            return
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self._fail(error, size=len(data))

    def check(self) -> None:
        """Raises RunError if something failed."""
        if self.failure is not None:
            raise RunError(self.failure)

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()

    def _fail(self, error: OSError, *, size: int = 0) -> None:
        what = f"{size} bytes to {self._path}" if size else self._path
        self.failure = (
            f"cannot write {what} ({error.strerror}): make room or make it writable and start again, "
            "the run goes on from its last checkpoint"
        )


def truncate(path: Path, *, step: int, validated_step: int) -> None:
    """Drop what was written after the step a run resumes from, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if values["step"] <= (validated_step if values["kind"] == "validation" else step):
            kept.append(line)
    write_atomic(path, "".join(f"{line}\n" for line in kept))


def finite(value):
    """The same plain values with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
