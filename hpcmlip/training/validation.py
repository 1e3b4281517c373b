"""The objective and the errors over the whole validation split: sums and counts, one reduction, one division."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcmlip import dist
from hpcmlip.config import RunConfig
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import split_batches
from hpcmlip.launch import World
from hpcmlip.training.engine import MicroBatch
from hpcmlip.training.errors import error_sums, level_figures
from hpcmlip.training.objective import Objective


@dataclass(frozen=True)
class Validation:
    """What all ranks know after a validation."""

    objective: float
    """In `Objective.unit`."""
    levels: dict
    """As `errors.level_figures`."""


def validate(
    objective: Objective,
    dataset: Dataset,
    config: RunConfig,
    world: World,
    *,
    is_stopping: Callable[[], bool],
    watch: Callable[[Iterable[MicroBatch], int], Iterator[MicroBatch]],
) -> Validation | None:
    """Each structure of the validation split once, shared among the ranks; None if a rank was asked to stop meanwhile.

    `watch(batches, structures)` passes the batches of this rank on. A collective; the same result on every rank.
    """
    device = next(objective.parameters()).device
    sums, errors, stopped = [], torch.zeros(len(dataset.spec.levels), 2, 3, dtype=torch.float64, device=device), False
    objective.eval()
    batches = split_batches(dataset, config.data, "val", cutoff=config.model.cutoff, rank=world.rank, size=world.size)
    for micro_batch in watch(batches, -(-dataset.count("val") // world.size)):
        if is_stopping():
            stopped = True
            break
        own, wrong = batch_sums(objective, micro_batch)
        sums.append(own)
        errors += wrong
    # a rank without a batch does not know how many sums the model needs
    length = max(dist.gather(len(sums[0]) if sums else 0))
    own = sum(sums) if sums else torch.zeros(length, dtype=torch.float64, device=device)
    flag = torch.tensor([float(stopped)], dtype=torch.float64, device=device)
    total = dist.all_sum(torch.cat([flag, errors.flatten(), own])).cpu()
    if total[0] > 0:
        return None
    errors, total = total[1 : 1 + errors.numel()].reshape(errors.shape), total[1 + errors.numel() :]
    # one rank's value for all: whether it is the best must not hang on a last digit
    value = dist.broadcast(float(objective.value(total)))
    return Validation(value, level_figures(errors.numpy(), dataset.spec.levels, config.loss.unit))


def batch_sums(objective: Objective, micro_batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Sums of the objective [S] and of the errors [L, 2, 3] (`error_sums`), without gradient."""
    device = next(objective.parameters()).device
    blocks = [block.to(device) for block in micro_batch]
    with torch.no_grad():
        predictions = objective.potential(blocks)
        errors = [error_sums(objective.spec, *pair) for pair in zip(blocks, predictions, strict=True)]
        return objective.sums(blocks, predictions), sum(errors)
