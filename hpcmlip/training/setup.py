"""What a run needs before its first step: a fitting number of ranks, a device, its streams of data."""

import torch

from hpcmlip.config import RunConfig
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import TrainLoader
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.launch import World


def open_loader(config: RunConfig, dataset: Dataset, world: World) -> TrainLoader:
    """Training batches of this rank's streams.

    Raises ConfigError if the model does not cover the structures, or as `Dataset.check_labels`.
    """
    limits = config.model.limits
    if "periodic" in limits and any(store.meta.periodic for store in dataset.stores):
        raise ConfigError(
            f"data.stores hold periodic structures, which model '{config.model.kind}' does not compute: "
            f"{limits['periodic']}"
        )
    dataset.check_labels()
    M = config.train.micro_batches_per_step
    own = range(world.rank * M // world.size, (world.rank + 1) * M // world.size)
    return TrainLoader(
        dataset, config.data, streams=own, num_streams=M, seed=config.train.seed, cutoff=config.model.cutoff
    )


def check_ranks(config: RunConfig, world: World) -> None:
    """Raises ConfigError unless the ranks share the micro-batches of a step evenly."""
    M = config.train.micro_batches_per_step
    if M % world.size:
        fitting = [n for n in range(1, M + 1) if M % n == 0]
        raise ConfigError(
            f"train.micro_batches_per_step is {M}, which {world.size} processes cannot share evenly: "
            f"start {' or '.join(map(str, fitting))} of them, or choose a multiple of {world.size}"
        )


def choose_device(wanted: str, world: World) -> torch.device:
    """Device of this process for `engine.device`. Raises RunError if a GPU is asked for and there is none."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RunError("engine.device is cuda, but torch finds no GPU here: ask the job for one, or set it to auto")
    # a launcher may show each process its own GPU only, which is then number 0
    device = torch.device("cuda", world.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
