"""Started by torchrun: whole trainings, one after another, on stores of few structures.

    few_structures_worker.py CONFIG.json OUT FAULT STORE...

For each store a run of two epochs with validation, checkpoint and model in OUT/<number of the store>; rank 0 leaves
OUT/<number>.json: for each epoch the sources of all structures that had a weight, of all ranks, in ascending order.
FAULT "unpadded": a rank leaves out the steps for which it has no structure of its own; "" for none.
"""

import copy
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from hpcmlip import dist, launch
from hpcmlip.config import RunConfig, from_values
from hpcmlip.training import rundir
from hpcmlip.training.loop import Training
from hpcmlip.training.stopping import Signals, StopRequests


def sources(step) -> list[list[int]]:
    """Of the structures that count."""
    return [
        [int(i) for i in source]
        for blocks in step
        for block in blocks
        for source, weight in zip(block.source, block.weight.tolist(), strict=True)
        if weight
    ]


def watched(batches: Callable, seen: dict[int, list], *, unpadded: bool) -> Callable:
    """The batches of a loader, each noted; `unpadded`: without those that only fill up."""

    def run(epoch: int, first: int = 0) -> Iterator:
        for step in batches(epoch, first):
            own = sources(step)
            if own or not unpadded:
                seen[epoch] += own
                yield step

    return run


def main() -> None:
    values, out, fault = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), sys.argv[3]
    world, device = launch.detect(), torch.device("cpu")
    dist.start(world, folder=out, device=device, timeout_minutes=values["engine"]["timeout_minutes"])
    for number, store in enumerate(sys.argv[4:]):
        own = copy.deepcopy(values)
        own["data"]["stores"] = [store]
        own["train"]["micro_batches_per_step"] = 2 * world.size
        run_dir, seen = out / str(number), defaultdict(list)
        run_dir.mkdir(exist_ok=True)
        config, requests = from_values(RunConfig, own, out, where="test"), StopRequests(Signals(), run_dir)
        training = Training(config, run_dir, world, device, requests)
        training.loader.batches = watched(training.loader.batches, seen, unpadded=fault == "unpadded")
        with rundir.RunDirectory(run_dir, config) if world.rank == 0 else nullcontext():
            assert training.run() == 0
        gathered = dist.gather(list(seen.items()))
        if world.rank == 0:
            epochs = defaultdict(list)
            for epoch, found in (item for items in gathered for item in items):
                epochs[epoch] += found
            (out / f"{number}.json").write_text(json.dumps([sorted(epochs[epoch]) for epoch in sorted(epochs)]))
    dist.stop()


if __name__ == "__main__":
    main()
