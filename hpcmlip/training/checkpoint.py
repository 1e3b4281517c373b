"""Checkpoints: a folder per step with safetensors, a JSON state and a manifest, visible only when it is complete.

Weights, optimizer moments and averages are stored whole, as float32, whatever the number of ranks and the ZeRO stage;
both may change before the run goes on. The manifest is sealed and holds the hashes of the rest. Nothing is ever
unpickled.
"""

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from hpcmlip import files
from hpcmlip.errors import RunError
from hpcmlip.sealing import SchemaError, seal, unseal

log = logging.getLogger(__name__)

SCHEMA = 2
MANIFEST = "MANIFEST.json"
STATE = "state.json"
_TEMPORARY = ".tmp-"
_ASIDE = f"{_TEMPORARY}old-"

Tensors = Mapping[str, Mapping[str, Tensor]]
"""File stem ("master", "exp_avg", ...) -> parameter name -> tensor."""


class AnotherVersionError(RunError):
    """A sound checkpoint that another version of hpcmlip wrote."""


@dataclass(frozen=True)
class Checkpoint:
    """What was read back."""

    path: Path
    state: dict
    tensors: dict[str, dict[str, Tensor]]


def write(folder: Path, step: int, state: dict, tensors: Tensors) -> Path:
    """Write `folder`/step_NNNNNNNN: temporary folder, hashes, fsync, rename. Raises OSError and then leaves nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    for rest in folder.glob(f"{_TEMPORARY}*"):  # of a job that was killed; the run directory is locked by this one
        shutil.rmtree(rest)
    final = folder / name(step)
    temporary = folder / f"{_TEMPORARY}{final.name}"
    temporary.mkdir()
    try:
        contents = {f"{stem}.safetensors": safetensors.torch.save(dict(group)) for stem, group in tensors.items()}
        contents[STATE] = json.dumps({"step": step, **state}, indent=1).encode()
        for file, content in contents.items():
            files.write(temporary / file, content)
        files.write(temporary / MANIFEST, seal({"files": _entries(contents)}, SCHEMA).encode())
        files.flush(temporary)
        aside = folder / f"{_ASIDE}{final.name}"
        if final.exists():  # the same step again, at the end of a run or after a resume from an older one
            final.rename(aside)
        temporary.rename(final)
        files.flush(folder)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        mend(folder)
        raise
    return final


def mend(folder: Path) -> None:
    """Put back a checkpoint that a killed job had put aside and not yet replaced; call it before any other."""
    for aside in folder.glob(f"{_ASIDE}*"):
        final = folder / aside.name.removeprefix(_ASIDE)
        if not final.exists():
            aside.rename(final)
            files.flush(folder)


def _entries(contents: Mapping[str, bytes]) -> dict:
    return {
        file: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for file, content in contents.items()
    }


def name(step: int) -> str:
    """Folder of the checkpoint of a step."""
    return f"step_{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, ascending, valid or not."""
    found = [path.name.removeprefix("step_") for path in folder.glob("step_*")] if folder.is_dir() else []
    return sorted(int(step) for step in found if step.isdigit())


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; None if there is none at all.

    Says in the log why others were passed over. Raises RunError if some exist but none verifies, or if the newest sound
    one was written by another version: going on from an older one would throw its work away.
    """
    reasons = []
    for step in reversed(steps(folder)):
        path = folder / name(step)
        try:
            return read(path)
        except AnotherVersionError:
            raise
        except RunError as error:
            reasons.append(str(error))
            log.warning("%s; looking for an older one", error)
    if reasons:
        raise RunError(
            f"none of the {len(reasons)} checkpoints in {folder} is sound (the newest: {reasons[0]}); "
            f"restore them from a copy, or remove {folder} to start again from the beginning"
        )
    return None


def read(path: Path) -> Checkpoint:
    """A checkpoint, every file checked against the manifest. Raises RunError naming what is wrong."""
    try:
        manifest = unseal((path / MANIFEST).read_bytes(), SCHEMA)
        contents = {file: _verified(path / file, entry) for file, entry in manifest["files"].items()}
        state = json.loads(contents.pop(STATE))
        tensors = {Path(file).stem: safetensors.torch.load(content) for file, content in contents.items()}
    except SchemaError as error:
        way = "upgrade hpcmlip" if error.is_newer else "finish the run with the hpcmlip that began it"
        raise AnotherVersionError(f"checkpoint {path} {error}: {way}, or choose another --run-dir") from None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise RunError(f"checkpoint {path} cannot be read ({reason})") from None
    return Checkpoint(path, state, tensors)


def _verified(path: Path, entry: Mapping) -> bytes:
    content = path.read_bytes()
    if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise RunError(f"checkpoint {path.parent} is damaged ({path.name} does not match its hash)")
    return content


def prune(folder: Path, step: int, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`, the one just written, and that of step `best`.

    Those of later steps did not verify when the run went on from before them; counted as the newest they would push
    out sound ones.
    """
    found = steps(folder)
    kept = {best, *[s for s in found if s <= step][-keep:]}
    for old in found:
        if old not in kept:
            # a folder that cannot be removed costs space, not the run
            with contextlib.suppress(OSError):
                shutil.rmtree(folder / name(old))
