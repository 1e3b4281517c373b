"""The run directory: one job at a time, one config, one record of the end."""

import fcntl
import hashlib
import json
import logging
import os
import socket
from pathlib import Path

from hpcmlip import launch
from hpcmlip.config import RunConfig, dump, flat, read_yaml
from hpcmlip.errors import ConfigError, RunError, UserError
from hpcmlip.files import write_atomic
from hpcmlip.models.card import WEIGHTS, read_model
from hpcmlip.sealing import SchemaError, seal, unseal

log = logging.getLogger(__name__)

SCHEMA = 2
"""Of the record of the end."""
CONFIG = "config.yaml"
DONE = "done.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
FINISHED = "finished"
PRUNED = "pruned"
"""States in the record of the end: trained as long as the config says, or ended early as not worth it."""
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
"""Beginnings of the keys that may differ when a run goes on: they change no number beyond rounding."""


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
        job = launch.job()
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else ""))
        self._lock.flush()
        path, text = self.path / CONFIG, dump(self._config)
        if path.exists():
            changed = differing(read_yaml(path), json.loads(self._config.model_dump_json()))
            # of a start that was refused, or ended before its first checkpoint, there is nothing to go on with
            if changed and self._has_come_far():
                raise ConfigError(
                    f"{self.path} belongs to a run with another config ({'; '.join(changed[:5])}): choose another "
                    "--run-dir, or remove it to start afresh; to train on from its weights, give 'transfer: {model: "
                    f"{self.path}}}'"
                )
            if path.read_text(encoding="utf-8") == text:
                return
        write_atomic(path, text)

    def _has_come_far(self) -> bool:
        checkpoints = self.path / CHECKPOINTS
        return (self.path / DONE).exists() or (checkpoints.is_dir() and any(checkpoints.iterdir()))

    @property
    def finished(self) -> dict | None:
        """As `finished`."""
        return finished(self.path)


def write_end(run_dir: Path, record: dict) -> None:
    """Leave the record of the end: what the run tells, with the hashes of its config and of the model it exported.

    Raises DataError if the model is not sound, OSError if the disk refuses.
    """
    _, card, _ = read_model(run_dir)
    hashes = {"config_sha256": _config_hash(run_dir), "weights_sha256": card["weights_sha256"]}
    write_atomic(run_dir / DONE, seal({"state": FINISHED, **record, **hashes}, SCHEMA))


def write_pruned(run_dir: Path, record: dict) -> None:
    """Leave the record of the end of a run that is not worth going on; it need not have a model. Raises OSError."""
    write_atomic(run_dir / DONE, seal({"state": PRUNED, **record}, SCHEMA))


def pruned(run_dir: Path) -> dict | None:
    """The record of a run that was ended early; None for any other. Raises RunError if it is damaged."""
    record = _end(run_dir)
    return record if record is not None and record.get("state") == PRUNED else None


def finished(run_dir: Path) -> dict | None:
    """The record of a run that ended by itself; None if it has not.

    Raises RunError if it is damaged or of another version, or if the config or the model beside it are no longer those
    that the run ended with.
    """
    record = _end(run_dir)
    if record is None or record.get("state") != FINISHED:
        return None
    try:
        _, card, _ = read_model(run_dir)
        found = {CONFIG: _config_hash(run_dir), WEIGHTS: card["weights_sha256"]}
    except UserError as error:
        raise RunError(f"the finished run {run_dir} is damaged ({error}): {_REMEDY}") from None
    for name, digest in ((CONFIG, record.get("config_sha256")), (WEIGHTS, record.get("weights_sha256"))):
        if found[name] != digest:
            raise RunError(f"{run_dir / name} is not what the run ended with (its sha256 differs): {_REMEDY}")
    return record


def _end(run_dir: Path) -> dict | None:
    """The record of the end, if there is one."""
    path = run_dir / DONE
    try:
        return unseal(path.read_bytes(), SCHEMA)
    except FileNotFoundError:
        return None
    except SchemaError as error:
        way = "upgrade hpcmlip" if error.is_newer else "use the hpcmlip that made it, or another --run-dir"
        raise RunError(f"{path} {error}: {way}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}): remove it to let the run go on") from None


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
