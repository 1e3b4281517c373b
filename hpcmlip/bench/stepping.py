"""What the speed benchmarks share: real molecules, a training step on them, and programs that take turns.

A step is energies, forces and the backward pass of a squared error of both to all parameters, from positions on.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from hpcmlip import configs
from hpcmlip.batch import AtomsBatch, DataSpec
from hpcmlip.errors import DataError
from hpcmlip.graph import DenseTopology
from hpcmlip.models.layers import HEAD_UNIT
from hpcmlip.models.potential import Potential

ELEMENTS = (1, 6, 7, 8)
SAMPLE = "samples/ab_initio_small.h5"
Step = Callable[[], tuple[Tensor, Tensor]]
"""Forward and backward once -> (energies [B], forces [A, 3]), kcal/mol; gradients are left in the parameters."""
Timer = Callable[[], float]
"""Does a step -> seconds that it took."""


def molecules(path: Path | None, atoms: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers [B, N] and positions [B, N, 3] Å of real conformations; None: of the packaged sample.

    Raises DataError if the file holds no molecule of that size.
    """
    path = path or configs.path(SAMPLE)
    found = []
    with h5py.File(path) as file:
        for group in file.values():
            numbers = group["atomic_numbers"][:]
            if len(numbers) == atoms and set(numbers.tolist()) <= set(ELEMENTS):
                found += [(numbers.astype(np.int64), pos) for pos in group["coordinates"][:count]]
    if not found:
        raise DataError(f"{path} holds no molecule of {atoms} atoms: choose another size with --atoms")
    # evenly over what there is, and again from the start if that is too little
    chosen = [found[int(i * max(len(found) / count, 1)) % len(found)] for i in range(count)]
    return np.stack([numbers for numbers, _ in chosen]), np.stack([pos for _, pos in chosen])


def species(numbers: np.ndarray, device) -> Tensor:
    """[A] places of the atoms [B, N] in `ELEMENTS`."""
    return torch.tensor(np.searchsorted(ELEMENTS, numbers.reshape(-1)), device=device)


def targets(B: int, N: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Energies [B] and forces [B * N, 3] to be wrong by."""
    generator = torch.Generator().manual_seed(1)
    return tuple(10 * torch.randn(shape, generator=generator).to(like) for shape in ((B,), (B * N, 3)))


def loss(energy: Tensor, forces: Tensor, wanted: tuple[Tensor, Tensor]) -> Tensor:
    """Squared errors of both."""
    return (energy - wanted[0]).square().mean() + (forces - wanted[1]).square().mean()


def data_spec() -> DataSpec:
    """One level with forces, without atomic energies."""
    zero = np.zeros((1, len(ELEMENTS)))
    return DataSpec(ELEMENTS, ("level",), (0,), reference=zero, residual=zero, isolated=(True,))


def potential_step(potential: Potential, numbers: np.ndarray, pos: np.ndarray, device, dtype=torch.float32) -> Step:
    """The step of a potential of one level, which is moved to the device and into training mode."""
    potential = potential.to(device, dtype).train()
    B, N = numbers.shape
    x = torch.tensor(pos, dtype=dtype, device=device).reshape(-1, 3)
    batch = AtomsBatch(
        species=species(numbers, device),
        pos=x,
        topology=DenseTopology(B, N),
        energy=None,
        forces=None,
        weight=torch.ones(B, dtype=dtype, device=device),
        source=np.zeros((B, 4), dtype=np.int64),
    )
    wanted = targets(B, N, x)

    def step() -> tuple[Tensor, Tensor]:
        potential.zero_grad()
        (prediction,) = potential([batch])
        energy, forces = prediction.energy[:, 0] / HEAD_UNIT, prediction.forces[:, 0] / HEAD_UNIT
        loss(energy, forces, wanted).backward()
        return energy.detach(), forces.detach()

    return step


def timer(step: Step) -> Timer:
    """Seconds of a step by the clock, with all that it started on a GPU."""

    def timed() -> float:
        _synchronize()
        start = time.perf_counter()
        step()
        _synchronize()
        return time.perf_counter() - start

    return timed


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(timers: Mapping[str, Timer], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat; the programs take turns, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for repeat in range(repeats + 1):
        for name, timed in timers.items():
            elapsed = timed()
            if repeat:  # the first one compiles and allocates
                seconds[name].append(elapsed)
    return seconds


def milliseconds(seconds: Sequence[float]) -> float:
    """Their median."""
    return round(1e3 * statistics.median(seconds), 2)


def ratio(reference: Sequence[float], seconds: Sequence[float]) -> tuple[float, list[float]]:
    """How many times as fast as the reference, in the same turn: median and quartiles."""
    ratios = sorted(a / b for a, b in zip(reference, seconds, strict=True))
    quarter = len(ratios) // 4
    return round(statistics.median(ratios), 2), [round(ratios[quarter], 2), round(ratios[-1 - quarter], 2)]
