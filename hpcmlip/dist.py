"""The processes of a run: `start` joins those of a `World`; every rank must call each collective, on every path."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from hpcmlip import rendezvous
from hpcmlip.errors import RunError, UserError
from hpcmlip.launch import World


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
