"""`hpcmlip evaluate`: errors of an ensemble on a split of a store, alone or on any number of ranks.

Each rank asks all members about its share of the structures; sums and counts are reduced once. Forces are compared for
every level for which the store has them, also where a level was trained on energies alone.
"""

import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from hpcmlip import dist, launch, progress
from hpcmlip.batch import AtomsBatch
from hpcmlip.data.loader import split_batches
from hpcmlip.data.store import SPLITS
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.evaluation import figures, members, output
from hpcmlip.evaluation.predictions import Spill
from hpcmlip.evaluation.sums import Result, Sums, result_sums
from hpcmlip.evaluation.task import Task, prepare
from hpcmlip.launch import World
from hpcmlip.plugins import suggest
from hpcmlip.training.setup import choose_device
from hpcmlip.units import ENERGY_UNITS

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Folder inside the output folder in which everything is written first."""
TIMEOUT_MINUTES = 30.0
"""A rank that waits longer than this for the others gives up."""


def evaluate(runs: Sequence[Path], store: Path, *, split: str, out: Path, unit: str, min_members: int = 1) -> None:
    """Evaluate run directories, or the members of experiment directories, and write metrics.json, predictions.zarr,
    plots and report.html into `out`; prints the table. With fewer than `min_members` finished models it fails.

    Raises ConfigError, DataError or RunError with what is wrong before anything is written.
    """
    if split not in SPLITS:
        raise ConfigError(f"there is no split '{split}'{suggest(split, SPLITS)}")
    if unit not in ENERGY_UNITS:
        raise ConfigError(f"there is no energy unit '{unit}'{suggest(unit, ENERGY_UNITS)}")
    found = members.find_members(runs, at_least=min_members)
    world = launch.detect()
    device = choose_device("auto", world)
    task = prepare(found.runs, store, split, device)
    partial = _folder(Path(out)) / PARTIAL
    if world.size > 1:
        dist.start(world, folder=Path(out), device=device, timeout_minutes=TIMEOUT_MINUTES)
        dist.share_cores()
    try:
        with dist.together("preparing the output folder"):
            if world.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
                (partial / "spill").mkdir(parents=True)
        with dist.together("the evaluation"):
            part = _run(task, world, Spill(partial / "spill", world.rank))
        sums = _reduce(part)
        with dist.together("writing the evaluation"):
            if world.rank == 0:
                figure = figures.metrics(sums, task.levels, task.sizes, unit)
                output.write(task, found, figure, unit=unit, partial=partial)
    finally:
        if world.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        dist.stop()


def _folder(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the output folder {out}: {error.strerror}; give another --out") from None
    return out


def _run(task: Task, world: World, spill: Spill) -> Sums:
    """Sums of this rank's share; its predictions go to the spill files."""
    total = Sums.zeros(len(task.ensemble.members), len(task.sizes), len(task.levels))
    share = -(-task.dataset.count(task.split) // world.size)
    blocks = results(task, rank=world.rank, size=world.size)
    if world.rank == 0:
        console = Console(stderr=True)
        blocks = progress.watch(blocks, "evaluating", share, console, size=lambda result: len(result.numbers))
    for result in blocks:
        place = task.sizes.index(result.numbers.shape[1])
        part = result_sums(result, task.dataset.spec.force_levels, place, total)
        total = Sums(total.errors + part.errors, total.spread + part.spread)
        spill.write(result)
    return total


def results(task: Task, *, rank: int, size: int) -> Iterator[Result]:
    """Labels and predictions of this rank's structures, a block at a time."""
    # labels in float64: totals are compared; the members convert to the dtype of their networks
    batches = split_batches(
        task.dataset,
        task.section,
        task.split,
        cutoff=task.ensemble.cutoff,
        rank=rank,
        size=size,
        dtype=torch.float64,
    )
    elements = np.array(task.dataset.spec.elements)
    for blocks in batches:
        numbers = [elements[b.species.numpy().reshape(b.num_structures, -1)] for b in blocks]
        answers = task.ensemble.ask(blocks, numbers, task.levels, task.force_levels)
        for block, z, answer in zip(blocks, numbers, answers, strict=True):
            _check_finite(task, block, answer)
            yield _result(task, block, z, answer)


def _check_finite(task: Task, block: AtomsBatch, answer: members.Answer) -> None:
    """Raises RunError naming the member: NaN would otherwise pass for a missing label."""
    bad = ~(np.isfinite(answer.energy).all(axis=2) & np.isfinite(answer.forces).all(axis=(2, 3, 4)))  # [P, B]
    if bad.any():
        member, structure = np.argwhere(bad)[0]
        _, file, group, row = block.source[structure]
        name = task.dataset.stores[0].meta.sources[file].name
        raise RunError(
            f"{task.ensemble.members[member].path} gives no finite energy and forces for row {row} of group {group} of "
            f"{name}: its training went wrong; leave it out or train it again"
        )


def _result(task: Task, block: AtomsBatch, numbers: np.ndarray, answer: members.Answer) -> Result:
    spec = task.dataset.spec
    B, N = numbers.shape
    species = block.species.numpy().reshape(B, N)
    return Result(
        numbers=numbers,
        source=block.source[:, 1:],
        energy_label=block.energy.numpy() + spec.reference_energy(species),
        energy=answer.energy,
        baseline=task.ensemble.first.baseline(numbers, task.levels),
        forces_label=block.forces.numpy().reshape(B, N, len(spec.force_levels), 3),
        forces=answer.forces,
    )


def _reduce(sums: Sums) -> Sums:
    """The sums of all ranks."""
    return sums.from_flat(dist.all_sum(torch.from_numpy(sums.flat())).numpy())
