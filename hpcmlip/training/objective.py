"""The training objective as a differentiable function of sums, so that its gradient is that of the whole step.

A rank returns sums over its micro-batch in one flat tensor, they are added over micro-batches and ranks, and only then
is anything divided or rooted (spec §2.3). RMSE of a step is not the mean of the RMSEs of its parts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hpcmlip.batch import AtomsBatch, Prediction
from hpcmlip.config import LossSection, RunConfig
from hpcmlip.errors import ConfigError
from hpcmlip.models.potential import Potential
from hpcmlip.training import hierarchicality
from hpcmlip.training.errors import Penalty, label_counts, penalty_sums
from hpcmlip.units import ENERGY_UNITS

_UNDER_ROOT = 1e-12
"""Added to a mean square, in the unit of the loss: the root has no derivative at 0."""


@dataclass(frozen=True)
class Loss:
    """What is summed over labels, and what becomes of the means."""

    penalties: tuple[Penalty, ...]
    combine: Callable[..., Tensor]
    """Mean of each penalty, in that order -> value."""
    is_square: bool = False
    """Is the value in the square of the unit of the errors?"""

    @property
    def is_mean(self) -> bool:
        """Is the value a plain mean over labels?"""
        return self.combine is _mean


def _rmse_mae(square: Tensor, absolute: Tensor) -> Tensor:
    return torch.sqrt(square + _UNDER_ROOT) + absolute


def _mean(penalty: Tensor) -> Tensor:
    return penalty


def log_cosh(error: Tensor, sharpness: float) -> Tensor:
    """ln(cosh(p x)) / p of an error x with p = `sharpness`: p x²/2 near 0, |x| - ln(2)/p far away."""
    size = error.abs()
    # cosh itself overflows; this argument of softplus is never positive, so nothing does
    return size + (nn.functional.softplus(-2 * sharpness * size) - math.log(2)) / sharpness


def huber(error: Tensor, delta: float) -> Tensor:
    """x²/2 of an error x up to `delta`, from there the tangent (Huber 1964)."""
    size = error.abs()
    return torch.where(size < delta, 0.5 * size.square(), delta * (size - 0.5 * delta))


LOSSES: dict[str, Callable[[LossSection], Loss]] = {
    "rmse_mae": lambda section: Loss((torch.square, torch.abs), _rmse_mae),
    "mse": lambda section: Loss((torch.square,), _mean, is_square=True),
    "mae": lambda section: Loss((torch.abs,), _mean),
    "log_cosh": lambda section: Loss((partial(log_cosh, sharpness=section.sharpness),), _mean),
    "huber": lambda section: Loss((partial(huber, delta=section.delta),), _mean, is_square=True),
}
"""By `loss.kind`. A further loss is one line: its penalties and how their means combine."""

SIZE_POWERS = {"molecule": 0.0, "atom": 1.0, "sqrt_atom": 0.25}
"""By `loss.energy_per`: energy errors are divided by the number of atoms to this power."""


class Objective(nn.Module):
    """A potential with its loss: Σ over levels of w_E Loss(energy) + w_F Loss(forces) + w_H Hier.

    Raises ConfigError if hierarchicality is weighted where isolated-atom energies are unknown.
    """

    def __init__(self, potential: Potential, config: RunConfig):
        super().__init__()
        self.potential, self.spec = potential, potential.spec
        self._loss, self._variant = LOSSES[config.loss.kind](config.loss), config.loss.hierarchicality
        self.unit = f"({config.loss.unit})²" if self._loss.is_square else config.loss.unit
        """Of the value, in words."""
        self._unit, self._size_power = ENERGY_UNITS[config.loss.unit], SIZE_POWERS[config.loss.energy_per]
        weights = [config.weights(level) for level in self.spec.levels]
        forces = [w.forces if i in self.spec.force_levels else 0.0 for i, w in enumerate(weights)]
        hierarchy = [w.hierarchicality for w in weights]
        self._has_hierarchy = any(hierarchy)
        pairs = [[w.energy, f] for w, f in zip(weights, forces, strict=True)]
        self._weights = torch.tensor(pairs, dtype=torch.float64)
        self._hierarchy = torch.tensor(hierarchy, dtype=torch.float64)
        for level, known, weight in zip(self.spec.levels, self.spec.isolated, weights, strict=True):
            if weight.hierarchicality and not known:
                raise ConfigError(
                    f"loss.weights.{level}.hierarchicality is {weight.hierarchicality:g}, but the energies of the "
                    f"isolated atoms at {level} are unknown, without which the regularizer has no meaning: give "
                    "'atomic_energies' of this level in DATA.yaml and shard again, or set the weight to 0"
                )

    @property
    def needs_sums(self) -> bool:
        """Does the slope depend on the errors, not on the numbers of labels alone?"""
        return self._has_hierarchy or not self._loss.is_mean

    def counts(self, blocks: Sequence[AtomsBatch]) -> Tensor:
        """[S] float64: the numbers of labels among the sums of a micro-batch, the rest 0; no network is asked."""
        counts = sum(label_counts(self.spec, block) for block in blocks)
        return torch.nn.functional.pad(counts[..., None], (0, len(self._loss.penalties))).flatten()

    def forward(self, blocks: Sequence[AtomsBatch]) -> Tensor:
        """[S] float64: the sums of a micro-batch, differentiable in training mode; they add over micro-batches."""
        return self.sums(blocks, self.potential(blocks))

    def sums(self, blocks: Sequence[AtomsBatch], predictions: Sequence[Prediction]) -> Tensor:
        """[S] float64: the sums of predictions already made."""
        return sum(self._block_sums(block, prediction) for block, prediction in zip(blocks, predictions, strict=True))

    def value(self, sums: Tensor) -> Tensor:
        """Objective (scalar) of sums over everything that belongs together; differentiable.

        The sums are on the CPU: on a GPU, so few numbers would cost little but the starts of many operations.
        """
        L, P = len(self.spec.levels), len(self._loss.penalties)
        errors, hierarchy = sums[: L * 2 * (1 + P)].reshape(L, 2, 1 + P), sums[L * 2 * (1 + P) :]
        count, totals = errors[..., 0], errors[..., 1:]
        means = totals / count.clamp(min=1)[..., None]
        terms = torch.where(count > 0, self._loss.combine(*means.unbind(-1)), 0.0)
        total = (self._weights * terms).sum()
        if hierarchy.numel():
            total = total + (self._hierarchy * hierarchicality.value(hierarchy.reshape(L, -1, 2))).sum()
        return total

    def slope(self, sums: Tensor) -> Tensor:
        """[S] derivative of the value by each sum, at globally reduced sums, on the CPU like these."""
        leaf = sums.detach().requires_grad_()
        return torch.autograd.grad(self.value(leaf), leaf)[0]

    def _block_sums(self, block: AtomsBatch, prediction: Prediction) -> Tensor:
        scale = {"unit": self._unit, "size_power": self._size_power}
        errors = penalty_sums(self.spec, block, prediction, self._loss.penalties, **scale)
        if not self._has_hierarchy:
            return errors.flatten()
        hierarchy = hierarchicality.sums(block, prediction, self._variant).double()
        return torch.cat([errors.flatten(), hierarchy.flatten()])


def surrogate(local: Tensor, slope: Tensor, num_ranks: int) -> Tensor:
    """Scalar whose gradient, averaged over ranks and added over micro-batches, is that of the objective of the step."""
    return num_ranks * (slope * local).sum()
