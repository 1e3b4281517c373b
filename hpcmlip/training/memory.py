"""Memory of this process, of a GPU, and what the machine and its job system allow."""

import resource
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from hpcmlip import dist, launch, rendezvous

_CGROUPS = (("", "memory.max"), ("memory", "memory.limit_in_bytes"))
"""Folder of the controller below the root and its file, of cgroup v2 and v1."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a run takes at its peak, and that it may take."""

    peak: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def host(extra: int = 0) -> Memory:
    """Of the machine where its processes take most of what they may; each takes `extra` more than so far.

    A collective; the same on every rank.
    """
    own = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + extra
    now = psutil.Process().memory_info().rss
    gathered = dist.gather((rendezvous.machine(), own, now, _job_limit()))
    free = dist.gather(psutil.virtual_memory().available)
    found = []
    for (machine, _, _, limit), available in zip(gathered, free, strict=True):
        here = [item for item in gathered if item[0] == machine]
        most = available + sum(item[2] for item in here)
        found.append(Memory(sum(item[1] for item in here), min(most, limit or most)))
    return max(found, key=lambda memory: memory.peak / memory.limit)


def gpu(device: torch.device) -> Memory | None:
    """Of the GPU with most in use; None without GPUs. A collective; the same on every rank."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    own = (torch.cuda.max_memory_allocated(device), free + torch.cuda.memory_reserved(device))
    return max((Memory(*item) for item in dist.gather(own)), key=lambda memory: memory.peak / memory.limit)


def _job_limit() -> int | None:
    limits = [limit for limit in (launch.memory_limit(), control_group_limit()) if limit]
    return min(limits, default=None)


def control_group_limit(table: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The lowest limit on the way from this process's control group up to the root; None without one."""
    try:
        paths = [line.split(":", 2)[1:] for line in table.read_text().splitlines()]
    except OSError:
        return None
    found = []
    for controller, file in _CGROUPS:
        for names, path in paths:
            if controller in names.split(","):
                group = Path(path.lstrip("/"))
                found += [_limit(root / controller / folder / file) for folder in (group, *group.parents)]
    return min((limit for limit in found if limit is not None), default=None)


def _limit(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
