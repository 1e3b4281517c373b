"""Who else takes part in this run, as the launcher's variables tell it: `detect`.

The only reader of RANK, SLURM_*, OMPI_* and their kin. Started alone, under torchrun, srun or mpirun, the rest of the
program sees a `World`; `hpcmlip.dist` joins its processes.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from hpcmlip.errors import RunError


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Place among the processes of this machine: the number of its GPU."""
    launcher: str = "alone"
    """torchrun, srun, mpirun, env (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT given by hand) or alone."""
    key: str = ""
    """Common to the processes of this launch and to no other; names the rendezvous file."""


_OTHER_SIZES = (
    "WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "JSM_NAMESPACE_SIZE",
    "FLUX_JOB_SIZE",
    "MPI_LOCALNRANKS",
)
"""Sizes that other launchers leave in the environment: enough to see that this process is not the whole run."""

_FIRST_SPECIAL_STEP = 4294967290
"""Slurm numbers the steps of the batch script, of salloc's shell and of the system from here on (slurm.h)."""


def detect(env: Mapping[str, str] | None = None) -> World:
    """The world that the launcher's variables describe.

    Raises RunError where a process would take itself for the whole run though others were started beside it.
    """
    env = os.environ if env is None else env
    world = _torchrun(env) or _openmpi(env) or _srun(env)
    if world is not None:
        return world
    _refuse_batch_without_srun(env)
    for name in _OTHER_SIZES:
        if _number(env, name, 1) > 1:
            raise RunError(
                f"{name}={env[name]} says that several processes were started, but this launcher does not say which "
                "one this is in a form known here: start with srun, torchrun or Open MPI's mpirun"
            )
    return World()


def job() -> str | None:
    """Number of the Slurm job around this process, for messages; None outside of one."""
    return os.environ.get("SLURM_JOB_ID")


def job_end(env: Mapping[str, str] | None = None) -> float | None:
    """When the Slurm job around this process ends, in seconds since 1970; None outside of one, or if it does not say.

    A Slurm that sets no SLURM_JOB_END_TIME (22.05) is asked: call it once a run, on rank 0. Where another system
    runs the jobs, the variable may be set by hand.
    """
    env = os.environ if env is None else env
    if "SLURM_JOB_END_TIME" in env:
        return float(_number(env, "SLURM_JOB_END_TIME"))
    if "SLURM_JOB_ID" not in env:
        return None
    # the number of the first task of an array is that of the whole array as well
    array = "SLURM_ARRAY_JOB_ID" in env and "SLURM_ARRAY_TASK_ID" in env
    name = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]
    ask = ["squeue", "--noheader", f"--jobs={name}", "--format=%e"]
    try:
        said = subprocess.run(
            ask, env={**env, "SLURM_TIME_FORMAT": "%s"}, capture_output=True, text=True, timeout=30, check=False
        )
        return float(said.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):  # no squeue in a container, no answer, no limit
        return None


def memory_limit(env: Mapping[str, str] | None = None) -> int | None:
    """Bytes that Slurm gives this job on a node; None outside of one, or where it sets no limit."""
    env = os.environ if env is None else env
    megabytes = _number(env, "SLURM_MEM_PER_NODE", 0)
    megabytes = megabytes or _number(env, "SLURM_MEM_PER_CPU", 0) * _number(env, "SLURM_CPUS_ON_NODE", 1)
    return megabytes * 2**20 or None


def _torchrun(env: Mapping[str, str]) -> World | None:
    if not all(name in env for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")):
        return None
    tasks = _step_tasks(env)
    launcher = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "env"
    agents = _number(env, "GROUP_WORLD_SIZE", 1) if launcher == "torchrun" else _number(env, "WORLD_SIZE", 1)
    if tasks > 1 and agents != tasks:
        raise RunError(
            f"srun started {tasks} tasks and each believes to be "
            + (f"one of {agents} torchrun agents" if launcher == "torchrun" else f"one of {agents} processes (RANK)")
            + ": start one torchrun a node with --nnodes and a common --rdzv-endpoint, or simply 'srun hpcmlip train'"
        )
    return World(
        _number(env, "RANK"), _number(env, "WORLD_SIZE"), _number(env, "LOCAL_RANK", 0), launcher, "environment"
    )


def _openmpi(env: Mapping[str, str]) -> World | None:
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    size, tasks = _number(env, "OMPI_COMM_WORLD_SIZE"), _step_tasks(env)
    if tasks > size:
        raise RunError(
            f"srun started {tasks} tasks and each started an mpirun of {size}: use one of the two, "
            "'srun hpcmlip train' or 'mpirun hpcmlip train'"
        )
    # Open MPI 5 carries the name of the job in PMIX_NAMESPACE, Open MPI 4 in the other
    key = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid", "")
    if size > 1 and not key:
        raise RunError("this mpirun gives its processes no common job name (PMIX_NAMESPACE): use Open MPI 4 or newer")
    rank, local_rank = _number(env, "OMPI_COMM_WORLD_RANK"), _number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    return World(rank, size, local_rank, "mpirun", f"mpi-{key}")


def _srun(env: Mapping[str, str]) -> World | None:
    if not _in_step(env):
        return None
    if "SLURM_PROCID" not in env:
        raise RunError("this Slurm step does not say which task this is (SLURM_PROCID): pass the environment through")
    size = _step_tasks(env)
    key = f"slurm-{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}.{env.get('SLURM_RESTART_COUNT', '0')}"
    return World(_number(env, "SLURM_PROCID"), size, _number(env, "SLURM_LOCALID", 0), "srun", key)


def _in_step(env: Mapping[str, str]) -> bool:
    return "SLURM_JOB_ID" in env and 0 <= _number(env, "SLURM_STEP_ID", -1) < _FIRST_SPECIAL_STEP


def _step_tasks(env: Mapping[str, str]) -> int:
    """Tasks of the Slurm step around this process; 0 outside of one."""
    return _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1)) if _in_step(env) else 0


def _refuse_batch_without_srun(env: Mapping[str, str]) -> None:
    if "SLURM_JOB_ID" not in env:
        return
    tasks = max(_number(env, "SLURM_NTASKS", 1), _number(env, "SLURM_NNODES", _number(env, "SLURM_JOB_NUM_NODES", 1)))
    if tasks > 1:
        raise RunError(
            f"Slurm job {env['SLURM_JOB_ID']} has {tasks} tasks or nodes, but this process was not started by srun and "
            "would be the only one at work: write 'srun hpcmlip train ...' in the batch script, or ask for one task"
        )


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    if name not in env:
        if default is None:
            raise RunError(f"the launcher set no {name}; start with srun, torchrun or mpirun, or unset its variables")
        return default
    try:
        return int(env[name])
    except ValueError:
        raise RunError(f"the environment says {name}={env[name]!r}, expected a whole number") from None
