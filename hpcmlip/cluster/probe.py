"""What `hpcmlip doctor` runs in processes of their own: `python -m hpcmlip.cluster.probe torch | sum RANK KEY FOLDER`.

Apart, because importing torch or joining processes may hang, crash or take memory.
"""

import json
import os
import sys
from pathlib import Path

import torch

from hpcmlip import dist
from hpcmlip.launch import World

SUM_MINUTES = 0.5


def torch_facts() -> dict:
    """What torch sees of this machine."""
    available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if available else [],
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
    }


def sum_of_two(rank: int, key: str, folder: Path) -> None:
    """One of two processes that meet through a file in `folder`, as those of a run do, and add up 1 and 2."""
    world = World(rank=rank, size=2, local_rank=rank, launcher="doctor", key=key)
    dist.start(world, folder=folder, device=torch.device("cpu"), timeout_minutes=SUM_MINUTES)
    total = dist.all_sum(torch.tensor([rank + 1.0])).item()
    dist.stop()
    if total != 3.0:
        sys.exit(f"the sum over two processes of 1 and 2 came out as {total:g}")


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        print(json.dumps(torch_facts()))
    else:
        sum_of_two(int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
