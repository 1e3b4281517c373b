"""Some steps of a run, its validation, its checkpoint and its largest micro-batch, measured in a scratch folder."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from hpcmlip import dist
from hpcmlip.batch import AtomsBatch
from hpcmlip.data import plan
from hpcmlip.data.loader import split_batches, split_work
from hpcmlip.errors import RunError
from hpcmlip.training.engine import MicroBatch
from hpcmlip.training.loop import Training
from hpcmlip.training.objective import surrogate
from hpcmlip.training.records import Progress
from hpcmlip.training.validation import batch_sums

WARM_UP_STEPS = 5
STEPS = 50
SHORT_SECONDS, LONG_SECONDS, FEWEST_STEPS = 8.0, 120.0, 10
"""The probe goes on for `STEPS` and at least the first; after the second, `FEWEST_STEPS` are enough."""
VALIDATION_SECONDS = 3.0
"""Of passes over the validation split, or over a part of it."""
KEPT = 12
"""Micro-batches whose size in memory is looked at."""


@dataclass(frozen=True)
class Timed:
    """Pieces of work and the seconds that each took."""

    work: np.ndarray
    """[n, 3] blocks, atoms, pairs."""
    seconds: np.ndarray
    """[n] by the clock."""


@dataclass(frozen=True)
class Measured:
    """What a probe has seen; times of this rank, whose steps wait for all ranks."""

    steps: Timed
    """Consecutive steps, the wait for data included."""
    waited: float
    """Seconds of these in which the next batch was not ready."""
    validation: Timed
    """Single batches without gradient."""
    checkpoint: float
    """Seconds."""
    export: float
    """Seconds to write the model."""
    epoch: np.ndarray
    """[steps, 3] work of each step of the first epoch, all ranks together."""
    validation_epoch: np.ndarray
    """[batches, ranks, 3] work of a whole validation."""
    bytes_per_atom: float
    """Of the decoded data."""


def run(training: Training) -> Measured:
    """Measure. A collective. Raises RunError if asked to stop meanwhile, or if no step gives finite numbers."""
    epoch = training.loader.work(0)
    _largest(training, epoch)
    steps, waited, kept = _steps(training)
    training.loader.close()
    progress = Progress(step=WARM_UP_STEPS + len(steps.seconds))
    size = sum(_bytes(block) for blocks in kept for block in blocks)
    return Measured(
        steps=steps,
        waited=waited,
        validation=_validation(training),
        checkpoint=_seconds(lambda: training.records.save(progress)),
        export=_seconds(lambda: training.records.export(progress)),
        epoch=epoch.sum(1),
        validation_epoch=split_work(training.dataset, training.config.data, "val", size=training.world.size),
        bytes_per_atom=size / sum(len(block.species) for blocks in kept for block in blocks),
    )


def _largest(training: Training, epoch: np.ndarray) -> None:
    """Forward and backward of this rank's largest micro-batches of an epoch, by pairs and by atoms."""
    failed = None
    try:
        for column in (2, 1):
            _forward_backward(training, _find(training, epoch[..., column]))
    except torch.OutOfMemoryError as error:
        failed = str(error).partition(". ")[0]
    found = [text for text in dist.gather(failed) if text]
    if found:
        raise RunError(
            f"the largest batch does not fit into the memory of the GPU ({found[0]}): "
            f"lower data.pairs_per_batch, now {training.config.data.pairs_per_batch}"
        )


def _find(training: Training, work: np.ndarray) -> MicroBatch:
    """The micro-batch of this rank with most of the work [steps, streams]."""
    config, world = training.config, training.world
    per_rank = config.train.micro_batches_per_step // world.size
    own = work[:, world.rank * per_rank : (world.rank + 1) * per_rank]
    step, stream = np.unravel_index(own.argmax(), own.shape)
    return next(training.loader.batches(0, int(step)))[stream]


def _forward_backward(training: Training, micro_batch: MicroBatch) -> None:
    """Past the engine: a rank that runs out of memory must not leave the others waiting in a reduction."""
    objective = training.engine.objective.train()
    sums = objective([block.to(training.engine.device) for block in micro_batch])
    parameters = list(training.engine.parameters().values())
    slope = objective.slope(sums.cpu()).to(sums.device)
    torch.autograd.grad(surrogate(sums, slope, 1), parameters, allow_unused=True)


def _steps(training: Training) -> tuple[Timed, float, list[MicroBatch]]:
    """Steps as a run takes them; of these the seconds without data; some micro-batches. No weight changes."""
    work, seconds, kept, waited, last = [], [], [], 0.0, 0.0
    for done, (sizes, micro_batches) in enumerate(_in_order(training)):
        asked_to_stop = training.requests.is_requested(look_for_file=False)
        is_enough = training.world.rank == 0 and _is_enough(len(seconds), sum(seconds))
        result = training.engine.step(micro_batches, 0.0, (float(asked_to_stop), float(is_enough)))
        training.average.update()
        _synchronize()
        now = time.perf_counter()
        if result.flags[0]:
            raise RunError("stopped on request, before there was a forecast")
        if result.flags[1]:
            break
        if done < WARM_UP_STEPS:
            waited = training.loader.waited
        elif result.applied:
            work.append(sizes)
            seconds.append(now - last)
        elif done >= STEPS > 2 * len(seconds):
            raise RunError("most steps give numbers that are not finite: look at the labels and the model's settings")
        last = now
        if done % (STEPS // KEPT) == 0 and len(kept) < KEPT:
            kept.append(micro_batches[0])
    return Timed(np.array(work), np.array(seconds)), training.loader.waited - waited, kept


def _in_order(training: Training) -> Iterator[tuple[np.ndarray, list[MicroBatch]]]:
    """[3] work of all ranks, and the micro-batches of this one, of each step from the first, epoch after epoch."""
    for epoch in itertools.count():
        yield from zip(training.loader.work(epoch).sum(1), training.loader.batches(epoch), strict=True)


def _is_enough(steps: int, seconds: float) -> bool:
    if seconds > LONG_SECONDS:
        return steps >= FEWEST_STEPS
    return steps >= STEPS and seconds > SHORT_SECONDS


def _validation(training: Training) -> Timed:
    """Batches of the validation split as a run takes them, the wait for data and the start of each pass included."""
    objective, dataset, config = training.engine.objective.eval(), training.dataset, training.config
    work, seconds = [], []

    while sum(seconds) < VALIDATION_SECONDS:
        last = time.perf_counter()
        for micro_batch in split_batches(dataset, config.data, "val", cutoff=config.model.cutoff, rank=0, size=1):
            batch_sums(objective, micro_batch)
            _synchronize()
            now = time.perf_counter()
            work.append(_work(micro_batch))
            seconds.append(now - last)
            last = now
            if sum(seconds) >= VALIDATION_SECONDS:
                break
    return Timed(np.array(work), np.array(seconds))


def _work(micro_batch: MicroBatch) -> list[int]:
    shapes = [
        (block.num_structures, block.topology.num_atoms, block.topology.cell is not None) for block in micro_batch
    ]
    return [len(shapes), sum(B * N for B, N, _ in shapes), sum(B * plan.pairs(N, periodic=p) for B, N, p in shapes)]


def _bytes(block: AtomsBatch) -> int:
    """Of what the loader keeps of these structures."""
    tensors = (block.species, block.pos, block.energy, block.forces)
    return sum(tensor.nbytes for tensor in tensors) + block.source.nbytes


def _seconds(action: Callable[[], None]) -> float:
    begin = time.perf_counter()
    action()
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
