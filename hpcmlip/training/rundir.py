"""The run directory: one job at a time, one config, one record of the end."""

import fcntl
import hashlib
import json
import logging
import os
import socket
from pathlib import Path

from hpcmlip import dist
from hpcmlip.config import RunConfig, dump, flat, read_yaml
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.files import write_atomic
from hpcmlip.models.export import CARD, WEIGHTS

log = logging.getLogger(__name__)

CONFIG = "config.yaml"
DONE = "done.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
_REMEDY = "restore it from a copy, or remove the run directory to train again"

MAY_CHANGE = (
    "engine.",
    "train.log_seconds",
    "train.checkpoint_",
    "train.keep_checkpoints",
    "data.cache_mb",
    "track",
    # where the stores lie may change; that they hold the same data is checked against the checkpoint
    "data.stores",
)
"""Beginnings of the keys that may differ when a run goes on: they change no number."""


class RunDirectory:
    """Holds the lock of a run directory while open; only rank 0 opens one.

    Raises RunError if another job works there, ConfigError if the directory belongs to a run with another config.
    """

    def __init__(self, path: Path, config: RunConfig):
        self.path, self._config = path, config
        self._lock = None

    def __enter__(self) -> "RunDirectory":
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / LOCK).open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise RunError(
                f"{self.path} is in use by {holder}: wait for it, cancel it, or choose another --run-dir"
            ) from None
        except OSError as error:  # Lustre mounted without flock, some network file systems
            log.warning("%s: no file locks here (%s), nothing keeps a second job out", self.path, error.strerror)
        try:
            self._claim()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._lock.close()

    def _claim(self) -> None:
        job = dist.job()
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else ""))
        self._lock.flush()
        path, text = self.path / CONFIG, dump(self._config)
        if path.exists():
            changed = differing(read_yaml(path), json.loads(self._config.model_dump_json()))
            if changed:
                raise ConfigError(
                    f"{self.path} belongs to a run with another config ({'; '.join(changed[:5])}): "
                    "choose another --run-dir, or remove it to start afresh"
                )
            if path.read_text(encoding="utf-8") == text:
                return
        write_atomic(path, text)

    @property
    def finished(self) -> dict | None:
        """As `finished`."""
        return finished(self.path)


def write_end(run_dir: Path, record: dict) -> None:
    """Leave the record of the end: what the run tells, with the hashes of its config and of the model it exported."""
    card = json.loads((run_dir / CARD).read_text())
    hashes = {"config_sha256": _config_hash(run_dir), "weights_sha256": card["weights_sha256"]}
    write_atomic(run_dir / DONE, json.dumps({"state": "finished", **record, **hashes}, indent=1))


def finished(run_dir: Path) -> dict | None:
    """The record of a run that ended by itself; None if it has not.

    Raises RunError if the config or the model beside it are no longer those it ended with.
    """
    try:
        record = json.loads((run_dir / DONE).read_text())
        if record["state"] != "finished":
            return None
        expected = {CONFIG: record["config_sha256"], WEIGHTS: record["weights_sha256"], CARD: record["weights_sha256"]}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{run_dir / DONE} cannot be read ({type(error).__name__}: {error}): remove it to let the run go on"
        ) from None
    try:
        found = {
            CONFIG: _config_hash(run_dir),
            WEIGHTS: hashlib.sha256((run_dir / WEIGHTS).read_bytes()).hexdigest(),
            CARD: json.loads((run_dir / CARD).read_text())["weights_sha256"],
        }
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunError(f"the finished run {run_dir} is damaged ({error}): {_REMEDY}") from None
    changed = [name for name in expected if found[name] != expected[name]]
    if changed:
        raise RunError(f"{run_dir / changed[0]} is not what the run ended with (its hash differs): {_REMEDY}")
    return record


def _config_hash(run_dir: Path) -> str:
    """Of the settings that make the run what it is."""
    settings = json.dumps(fixed(read_yaml(run_dir / CONFIG)), sort_keys=True)
    return hashlib.sha256(settings.encode()).hexdigest()


def differing(old: dict, new: dict) -> list[str]:
    """`key: old -> new` of each setting that differs and must not."""
    before, after = fixed(old), fixed(new)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in changed]


def fixed(config: dict) -> dict[str, object]:
    """Dotted key -> value of the settings that make a run what it is: those that must not change when it goes on."""
    return {key: value for key, value in flat(config).items() if not key.startswith(MAY_CHANGE)}


def holder(run_dir: Path) -> str | None:
    """Who works in a run directory or was the last to: `process PID on HOST[, Slurm job N]`; None for nobody yet."""
    try:
        return (run_dir / LOCK).read_text().strip() or None
    except OSError:
        return None
