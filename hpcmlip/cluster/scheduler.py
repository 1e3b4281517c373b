"""Slurm's client programs, one thin function each."""

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcmlip.errors import RunError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 60
"""A busy controller may take long to answer."""


def is_present() -> bool:
    """Whether this machine has Slurm's client programs."""
    return shutil.which("sbatch") is not None


def check_present() -> None:
    """Raises RunError where there is no Slurm."""
    if not is_present():
        raise RunError(
            "there is no sbatch on this machine: submit from a login node of the cluster, "
            "or run the members here with --local"
        )


def sbatch_command(script: Path, *, after: Sequence[str] = (), array: str = "") -> list[str]:
    """Command that submits a script; `after`: jobs and arrays whose end, good or bad, it waits for; `array`: the tasks,
    in place of those that the script names."""
    # afterok on an array waits for ever once a member has failed
    options = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    options += [f"--array={array}"] if array else []
    return ["sbatch", "--parsable", *options, str(script)]


def sbatch(command: Sequence[str], folder: Path) -> str:
    """Submit from `folder`; the id of the job or array. Raises RunError with what sbatch said."""
    answer = _run(command, folder)
    return answer.split(";")[0].strip()  # --parsable gives id;cluster on a federation


def states(jobs: Sequence[str], seconds: float = ANSWER_SECONDS) -> dict[str, str]:
    """State (PENDING, RUNNING, ...) of each job or array task (ARRAY_TASK) of these that has not ended, in one call.

    Raises RunError if Slurm does not answer within `seconds`.
    """
    if not jobs:
        return {}
    command = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={','.join(jobs)}"]
    try:
        found = subprocess.run(
            command, env=clean(os.environ), check=False, text=True, capture_output=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        raise RunError(f"Slurm does not say within {seconds:g} s which jobs still run: try again later") from None
    except OSError as error:
        raise RunError(f"squeue cannot tell which jobs still run: {error}") from None
    # what it says of a single job that Slurm has forgotten; of several it leaves out the forgotten ones
    if found.returncode and "Invalid job id" not in found.stderr:
        raise RunError(f"squeue cannot tell which jobs still run: {found.stderr.strip()}")
    return dict(line.split() for line in found.stdout.splitlines() if line.strip())


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; raises RunError with what scancel said."""
    _run(["scancel", *jobs], Path.cwd())


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """Environment without what a surrounding job says about itself, which a job submitted from it would inherit, and
    without the user's filters of squeue."""
    return {k: v for k, v in env.items() if not k.startswith(("SLURM_", "SQUEUE_")) or k == "SLURM_CONF"}


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=clean(os.environ), check=False, text=True, capture_output=True)
    if done.returncode:
        raise RunError(f"{command[0]} refused ({done.stderr.strip() or done.stdout.strip()})")
    if done.stderr.strip():
        log.warning("%s: %s", command[0], done.stderr.strip())
    return done.stdout
