"""Errors as sums: counts, Σ|e| and Σe² per level and property. Reduce over ranks once, divide last.

Never a mean of means: ranks, blocks and steps hold different numbers of atoms and labels.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hpcmlip.batch import AtomsBatch, DataSpec, Prediction
from hpcmlip.units import ENERGY_UNITS

PROPERTIES = ("energy", "forces")


def masked_error(prediction: Tensor, label: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """(error, mask): prediction - label where there is a label (not NaN) and `keep`, else 0 with zero gradient."""
    mask = keep & ~torch.isnan(label)
    # `where` on both sides of the subtraction: 0 * NaN is NaN, backward too
    error = torch.where(mask, prediction, 0.0) - torch.where(mask, label, 0.0)
    return error, mask


def batch_errors(batch: AtomsBatch, prediction: Prediction) -> dict[str, tuple[Tensor, Tensor]]:
    """Property -> (error, mask): energy [B, L] eV and, where forces were predicted, forces [A, Lf, 3] eV/Å."""
    real = batch.weight > 0
    errors = {"energy": masked_error(prediction.energy, batch.energy, real[:, None])}
    if prediction.forces is not None:
        keep = batch.topology.lift_structures(real)[:, None, None]
        errors["forces"] = masked_error(prediction.forces, batch.forces, keep)
    return errors


def label_counts(spec: DataSpec, batch: AtomsBatch) -> Tensor:
    """[L, 2] float64: numbers of energies and force components of a batch that `penalty_sums` counts."""
    real = batch.weight > 0
    counts = torch.zeros(len(spec.levels), 2, dtype=torch.float64, device=batch.energy.device)
    counts[:, 0] = (real[:, None] & ~torch.isnan(batch.energy)).sum(0)
    components = batch.topology.lift_structures(real)[:, None, None] & ~torch.isnan(batch.forces)
    counts[list(spec.force_levels), 1] = components.sum((0, 2)).double()
    return counts


Penalty = Callable[[Tensor], Tensor]
"""Error -> penalty, element by element."""


def error_sums(spec: DataSpec, batch: AtomsBatch, prediction: Prediction) -> Tensor:
    """[L, 2, 3] float64: (count, Σ|e|, Σe²) of energies (eV) and force components (eV/Å) by level; differentiable."""
    return penalty_sums(spec, batch, prediction, (torch.abs, torch.square))


def penalty_sums(
    spec: DataSpec,
    batch: AtomsBatch,
    prediction: Prediction,
    penalties: Sequence[Penalty],
    *,
    unit: float = 1.0,
    size_power: float = 0.0,
) -> Tensor:
    """[L, 2, 1 + P] float64: count and the sum of each penalty of the errors, per level and property; differentiable.

    `unit` is the size in eV of the energy unit in which the penalties see the errors. Energy errors of a structure of N
    atoms are divided by N^`size_power` before.
    """
    errors = batch_errors(batch, prediction)
    energy = _column_sums(*errors["energy"], penalties, unit * batch.topology.num_atoms**size_power)
    forces = dict.fromkeys(range(len(spec.levels)), torch.zeros_like(energy[0]))
    if "forces" in errors:
        error, mask = (x.transpose(1, 2).flatten(0, 1) for x in errors["forces"])  # [A * 3, Lf]
        forces |= zip(spec.force_levels, _column_sums(error, mask, penalties, unit), strict=True)
    return torch.stack([energy, torch.stack(list(forces.values()))], dim=1)


def _column_sums(error: Tensor, mask: Tensor, penalties: Sequence[Penalty], unit: float) -> Tensor:
    """[n, C], [n, C] -> [C, 1 + P] float64."""
    e = error.double() / unit
    # a penalty of 0 need not be 0
    values = [torch.where(mask, penalty(e), 0.0).sum(0) for penalty in penalties]
    return torch.stack([mask.double().sum(0), *values], dim=1)


def unit_of(prop: str, unit: str) -> str:
    """Unit of a property's figures where energies are in `unit`."""
    return unit if prop == "energy" else f"{unit}/Å"


def mae_rmse(sums: Sequence[float], unit: str) -> dict[str, float]:
    """{"mae", "rmse"} in `unit` of (count, Σ|e|, Σe²) in eV."""
    count, absolute, square = map(float, sums)
    scale = ENERGY_UNITS[unit]
    return {"mae": absolute / count / scale, "rmse": math.sqrt(square / count) / scale}


def level_figures(sums: np.ndarray, levels: Sequence[str], unit: str) -> dict[str, dict[str, dict]]:
    """{level: {property: {"mae", "rmse", "unit", "count"}}} of [L, 2, 3]; a property without labels is left out."""
    return {
        name: {
            prop: mae_rmse(own, unit) | {"unit": unit_of(prop, unit), "count": round(float(own[0]))}
            for prop, own in zip(PROPERTIES, sums[level], strict=True)
            if own[0] > 0
        }
        for level, name in enumerate(levels)
    }
