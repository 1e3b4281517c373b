"""`python -m hpcmlip.bench.step_rank RUN.yaml RUN_DIR`: a rank of a run that takes each step when it is told to.

A turn is a step of `Training`, as `hpcmlip train` takes it, and then one of plain torch on the same batch, in the same
process, after a pair of steps that does not count: whatever else the machine does meanwhile slows both. Rank 0 is
asked by lines on its standard input and answers with lines of JSON.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path

import torch
from torch import Tensor

from hpcmlip import dist, launch
from hpcmlip.bench.calls import timed
from hpcmlip.config import RunConfig, load
from hpcmlip.data import plan
from hpcmlip.models.potential import Potential
from hpcmlip.training.engine import MicroBatch
from hpcmlip.training.loop import Training
from hpcmlip.training.objective import Objective, surrogate
from hpcmlip.training.optimizers import OPTIMIZERS
from hpcmlip.training.reporting import Reporter
from hpcmlip.training.stopping import Signals, StopRequests

STEP, REDUCE, END = "step", "reduce", "end"
"""What rank 0 is asked for."""
PARTS = ("forward", "agreement", "backward", "update")
"""Of a step of plain torch; backward: with the reduction of the gradients; update: clipping and optimizer."""
REDUCE_BYTES = (8, 2**16, 2**20, 2**22, 2**24)
_REDUCE_REPEATS = 20


class Plain:
    """The least that a step can be: forward, objective, backward, mean over ranks, clipping, update."""

    def __init__(self, training: Training):
        config = training.config
        potential = Potential(config.model, training.dataset.spec, seed=config.train.seed)
        self._objective = Objective(potential, config).train()
        self.parameters = {name: p for name, p in potential.named_parameters() if p.requires_grad}
        settings = config.optim.model_dump(include={"lr", "betas", "eps", "weight_decay"})
        self._optimizer = OPTIMIZERS[config.optim.kind](self.parameters.values(), **settings)
        self._clip_norm, self._ranks = config.optim.clip_norm, training.world.size

    def step(self, micro_batches: list[MicroBatch], seconds: dict[str, float]) -> None:
        """The micro-batches of this rank as one batch; `seconds` of its `PARTS` are written there."""
        marks = [time.perf_counter()]
        self._optimizer.zero_grad()
        sums = self._objective([block for blocks in micro_batches for block in blocks])
        marks.append(time.perf_counter())
        # the value of one rank's sums is that of the step only if there is one rank
        loss = self._objective.value(sums) if self._ranks == 1 else self._surrogate(sums)
        marks.append(time.perf_counter())
        loss.backward()
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        if self._ranks > 1:
            flat = torch.cat([p.grad.flatten() for p in parameters])
            torch.distributed.all_reduce(flat)
            pieces = (flat / self._ranks).split([p.numel() for p in parameters])
            for p, piece in zip(parameters, pieces, strict=True):
                p.grad = piece.view_as(p)
        marks.append(time.perf_counter())
        if self._clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm)
        self._optimizer.step()
        marks.append(time.perf_counter())
        seconds |= {f"plain {part}": b - a for part, (a, b) in zip(PARTS, pairwise(marks), strict=True)}
        seconds["plain"] = marks[-1] - marks[0]

    def _surrogate(self, sums: Tensor) -> Tensor:
        return surrogate(sums, self._objective.slope(dist.all_sum(sums)), self._ranks)


class Turns:
    """The batches of a run's loader, each handed out when rank 0 is told to go on."""

    def __init__(self, training: Training, plain: Plain, answers):
        self._training, self._plain, self._answers = training, plain, answers
        self._loader, self._batches = training.loader, training.loader.batches
        self._seconds: dict[str, float] = {}
        self._watch(training.engine, "step", "engine")
        self._watch(training.engine, "_local_sums", "forward")
        self._watch(training.engine._deepspeed, "backward", "backward")
        self._watch(training.engine._deepspeed, "step", "update")
        self._watch(training.average, "update", "average")

    def watch_reports(self, reporter: Reporter) -> None:
        self._watch(reporter, "step", "reports")

    def batches(self, _epoch: int, _first_step: int = 0) -> Iterator[list[MicroBatch]]:
        """In place of the loader's: as many epochs as there are turns."""
        stream = (micro_batches for epoch in count() for micro_batches in self._batches(epoch))
        while self._is_asked():
            # the other run has emptied the caches meanwhile, and they are filled by whoever comes first
            micro_batches = next(stream)
            yield micro_batches
            self._plain.step(micro_batches, {})
            waited = self._loader.waited
            dist.barrier()
            self._seconds = {}
            begin, cpu = time.perf_counter(), time.process_time()
            micro_batches = next(stream)
            yield micro_batches
            self._seconds |= {"hpcmlip": time.perf_counter() - begin, "hpcmlip cpu": time.process_time() - cpu}
            self._seconds["data"] = self._loader.waited - waited
            dist.barrier()
            cpu = time.process_time()
            self._plain.step(micro_batches, self._seconds)
            self._seconds["plain cpu"] = time.process_time() - cpu
            answer = {"seconds": self._seconds, "difference": self._difference(), **_work(micro_batches)}
            self._answer(answer)

    def _watch(self, owner, method: str, part: str) -> None:
        """Add the time of every call of a method to that of a part."""

        def add(seconds: float) -> None:
            self._seconds[part] = self._seconds.get(part, 0.0) + seconds

        timed(owner, method, add)

    def _is_asked(self) -> bool:
        """Rank 0 waits for a line, the others for rank 0. False at the end."""
        while True:
            asked = dist.broadcast(sys.stdin.readline().strip() if self._training.world.rank == 0 else None)
            if asked != REDUCE:
                return asked == STEP
            self._answer({"seconds": [_reduce(size) for size in REDUCE_BYTES]})

    def _answer(self, values: dict) -> None:
        if self._training.world.rank == 0:
            print(json.dumps(values), file=self._answers, flush=True)

    @torch.no_grad()
    def _difference(self) -> float:
        """Largest of any weight tensor to plain torch's, relative to its norm."""
        theirs, ours = self._plain.parameters, self._training.engine.parameters()
        return max(float((ours[name] - p).norm() / p.norm()) for name, p in theirs.items())


def _work(micro_batches: list[MicroBatch]) -> dict[str, int]:
    """Structures and pairs of a step, those of all ranks."""
    blocks = [block for blocks in micro_batches for block in blocks]
    pairs = sum(
        block.num_structures * plan.pairs(block.topology.num_atoms, periodic=block.topology.cell is not None)
        for block in blocks
    )
    found = dist.gather((sum(block.num_structures for block in blocks), pairs))
    return dict(zip(("structures", "pairs"), map(sum, zip(*found, strict=True)), strict=True))


def _reduce(size: int) -> float:
    """Seconds of an all-reduce of so many bytes, the median of some."""
    tensor, seconds = torch.zeros(size // 4), []
    for _ in range(_REDUCE_REPEATS):
        dist.barrier()
        begin = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def main() -> None:
    """Take turns until told to end."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("run_dir", type=Path)
    options = parser.parse_args()
    # whatever prints, the answers stay alone on what was the standard output
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    world = launch.detect()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[world.local_rank % len(cores)]})
    config = load(RunConfig, options.run)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu")
    dist.start(world, folder=options.run_dir, device=device, timeout_minutes=config.engine.timeout_minutes)
    requests = StopRequests(Signals(), options.run_dir)
    training = Training(config, options.run_dir, world, device, requests)
    turns = Turns(training, Plain(training), answers)
    is_first = world.rank == 0
    if is_first:
        hello = {
            "parameters": sum(p.numel() for p in training.engine.parameters().values()),
            "threads": torch.get_num_threads(),
            "epoch_pairs": training.loader.work(0)[:, :, 2].flatten().tolist(),
        }
        print(json.dumps(hello), file=answers, flush=True)
    training.loader.batches = turns.batches
    with Reporter(config, options.run_dir, enabled=is_first, first_step=0, seconds_left=lambda: None) as reporter:
        turns.watch_reports(reporter)
        training.steps(reporter)
    training.loader.close()
    dist.barrier()
    dist.stop()
    os._exit(0)


if __name__ == "__main__":
    main()
