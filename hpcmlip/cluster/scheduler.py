"""Slurm's client programs, one thin function each."""

import logging
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpcmlip.errors import RunError

log = logging.getLogger(__name__)


def check_present() -> None:
    """Raises RunError where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise RunError(
            "there is no sbatch on this machine: submit from a login node of the cluster, "
            "or run the members here with --local"
        )


def sbatch_command(script: Path, *, after: str | None = None) -> list[str]:
    """Command that submits a script; `after`: job or array whose end, good or bad, it waits for."""
    # afterok on an array waits for ever once a member has failed
    return ["sbatch", "--parsable", *([f"--dependency=afterany:{after}"] if after else []), str(script)]


def sbatch(command: Sequence[str], folder: Path) -> str:
    """Submit from `folder`; the id of the job or array. Raises RunError with what sbatch said."""
    answer = _run(command, folder)
    return answer.split(";")[0].strip()  # --parsable gives id;cluster on a federation


def queued(jobs: Sequence[str]) -> list[str]:
    """Those of these jobs and arrays that still wait or run."""
    waiting = []
    for job in jobs:
        # one at a time: squeue refuses the whole list for one id that Slurm has forgotten
        found = subprocess.run(
            ["squeue", "--noheader", "--format=%i", f"--jobs={job}"],
            env=clean(os.environ),
            check=False,
            text=True,
            capture_output=True,
        )
        if found.returncode and "Invalid job id" not in found.stderr:
            raise RunError(f"squeue cannot tell whether job {job} still runs: {found.stderr.strip()}")
        waiting += [job] if found.stdout.strip() else []
    return waiting


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs; raises RunError with what scancel said."""
    _run(["scancel", *jobs], Path.cwd())


def clean(env: Mapping[str, str]) -> dict[str, str]:
    """Environment without what a surrounding job says about itself: a job submitted from a job would inherit it."""
    return {key: value for key, value in env.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=clean(os.environ), check=False, text=True, capture_output=True)
    if done.returncode:
        raise RunError(f"{command[0]} refused ({done.stderr.strip() or done.stdout.strip()})")
    if done.stderr.strip():
        log.warning("%s: %s", command[0], done.stderr.strip())
    return done.stdout
