"""Who else takes part in this run: `detect` reads the launcher's variables, `start` joins the processes.

The only reader of RANK, SLURM_*, OMPI_* and their kin. Started alone, under torchrun, srun or mpirun, the rest of the
program sees a `World` and the collectives below; every rank must call each of them, on every path.
"""

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from hpcmlip import rendezvous
from hpcmlip.errors import RunError, UserError


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


# ------------------------------------------------------------------------------------------------- the process group


def start(world: World, *, folder: Path, device: torch.device, timeout_minutes: float) -> None:
    """Join the processes of `world`; `folder` is on a file system that all of them see.

    A process on its own opens no port. Raises RunError if the others do not come within the timeout.
    """
    timeout = timedelta(minutes=timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world.launcher in ("torchrun", "env"):
        torch_dist.init_process_group(backend, init_method="env://", timeout=timeout)
        return
    if world.size == 1:
        store = torch_dist.HashStore()
    else:
        store = rendezvous.meet(folder, world.key, rank=world.rank, size=world.size, timeout=timeout)
    _choose_interface(store, world)
    torch_dist.init_process_group(
        backend,
        store=torch_dist.PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
    )
    if world.size > 1:
        barrier()
        if world.rank == 0:
            rendezvous.leave(folder, world.key)


def _choose_interface(store: torch_dist.Store, world: World) -> None:
    """Tell gloo which network interface reaches the others; its own guess is the host name, which may be a loopback."""
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    machine = rendezvous.machine()
    store.set(f"machine/{world.rank}", machine)
    machines = {store.get(f"machine/{rank}").decode() for rank in range(world.size)}
    name = rendezvous.loopback() if len(machines) == 1 else rendezvous.outward_interface()
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name


def limit_waiting(timeout_minutes: float) -> None:
    """Set the timeout on every group there is: those that DeepSpeed makes do not inherit it (torch: new_group)."""
    c10d = torch_dist.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)


def share_cores() -> None:
    """Give torch the cores of this process, divided among the ranks that have the same ones.

    Without it every rank of a machine starts a thread for each core. OMP_NUM_THREADS, where set, has the word.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    mine = [rendezvous.machine(), sorted(os.sched_getaffinity(0))]
    torch.set_num_threads(max(1, len(mine[1]) // gather(mine).count(mine)))


def is_lost_contact(error: Exception) -> bool:
    """Does a collective fail because another rank is gone or does not answer?"""
    text = str(error)
    return isinstance(error, torch_dist.DistError) or any(
        sign in text
        for sign in ("Connection closed by peer", "Connection reset", "Timed out waiting", "gloo/transport")
    )


def stop() -> None:
    """Leave the process group."""
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, the same on each; `tensor` itself where there is no group."""
    if not torch_dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    torch_dist.all_reduce(total)
    return total


def broadcast(value: Any) -> Any:
    """The value that rank 0 holds, on every rank; as in `gather`."""
    return gather(value if not torch_dist.is_initialized() or torch_dist.get_rank() == 0 else None)[0]


def gather(value: Any) -> list[Any]:
    """The values of all ranks, on every rank: plain values, of which tuples become lists.

    They travel as JSON. torch's own collectives of objects unpickle what comes over the network.
    """
    text = json.dumps(value).encode()
    if not torch_dist.is_initialized():
        return [json.loads(text)]
    ranks = range(torch_dist.get_world_size())
    own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in ranks]
    torch_dist.all_gather(lengths, torch.tensor([len(own)]))
    longest = int(max(lengths))
    padded = torch.cat([own, torch.zeros(longest - len(own), dtype=torch.uint8)])
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in ranks]
    torch_dist.all_gather(texts, padded)
    return [json.loads(texts[i].numpy().tobytes()[: int(lengths[i])]) for i in ranks]


def barrier() -> None:
    """Wait for all ranks."""
    all_sum(torch.zeros(1))


@contextmanager
def together(doing: str) -> Iterator[None]:
    """A block that fails on every rank if it fails on one: no rank waits for one that has given up.

    The block must not hold collectives of its own. Raises the error itself where it happened, a RunError elsewhere.
    """
    error: Exception | None = None
    try:
        yield
    except (UserError, OSError) as caught:
        error = caught
    failed = [f"{socket.gethostname()}: {text}" for text in gather(None if error is None else str(error)) if text]
    if isinstance(error, UserError):
        raise error
    if failed:
        raise RunError(f"{doing} failed: {failed[0]}") from error
