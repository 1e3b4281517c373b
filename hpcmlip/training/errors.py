"""Errors as sums: counts, Σ|e| and Σe² per level and property. Reduce over ranks once, divide last.

Never a mean of means: ranks, blocks and steps hold different numbers of atoms and labels.
"""

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


def error_sums(spec: DataSpec, batch: AtomsBatch, prediction: Prediction) -> Tensor:
    """[L, 2, 3] float64: (count, Σ|e|, Σe²) of energies (eV) and force components (eV/Å) of each level; differentiable."""
    errors = batch_errors(batch, prediction)
    sums = torch.zeros(len(spec.levels), 2, 3, dtype=torch.float64, device=batch.pos.device)
    sums = sums.index_copy(1, _index(0, sums), _column_sums(*errors["energy"])[:, None])
    if "forces" in errors and spec.force_levels:
        force = torch.zeros(len(spec.levels), 3, dtype=torch.float64, device=batch.pos.device)
        levels = torch.tensor(spec.force_levels, device=sums.device)
        force = force.index_copy(0, levels, _column_sums(*(x.transpose(1, 2).flatten(0, 1) for x in errors["forces"])))
        sums = sums.index_copy(1, _index(1, sums), force[:, None])
    return sums


def _index(value: int, like: Tensor) -> Tensor:
    return torch.tensor([value], device=like.device)


def _column_sums(error: Tensor, mask: Tensor) -> Tensor:
    """[n, C], [n, C] -> [C, 3] float64."""
    e = error.double()
    return torch.stack([mask.double().sum(0), e.abs().sum(0), (e * e).sum(0)], dim=1)


def figures(spec: DataSpec, sums: Tensor, unit: str = "kcal/mol") -> dict[str, dict[str, dict]]:
    """{level: {"energy" | "forces": {"mae", "rmse", "unit", "count"}}} of globally reduced sums [L, 2, 3].

    A property without any label is left out. Forces are in `unit`/Å.
    """
    scale = ENERGY_UNITS[unit]
    result: dict[str, dict[str, dict]] = {}
    for level, name in enumerate(spec.levels):
        result[name] = {}
        for column, prop in enumerate(PROPERTIES):
            count, absolute, square = sums[level, column].tolist()
            if count:
                result[name][prop] = {
                    "mae": absolute / count / scale,
                    "rmse": (square / count) ** 0.5 / scale,
                    "unit": unit if prop == "energy" else f"{unit}/Å",
                    "count": round(count),
                }
    return result
