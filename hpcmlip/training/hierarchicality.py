"""Hierarchicality of additive energy terms (HIP-NN): later terms are asked to be small beside the term before them.

With E_n the n-th term of an atom, the three variants (those of hippynn) are, for each n >= 1,

    atom      mean over structures of  sum_i  E_n^2 / (E_n^2 + E_{n-1}^2)
    molecule  mean over structures of  sum_i E_n^2 / sum_i (E_n^2 + E_{n-1}^2)
    batch     sum E_n^2 / sum (E_n^2 + E_{n-1}^2)  over all atoms of the step

and their sum over n is the value. Term 0 is the part that atoms have alone, so the value means something only where
energies are counted from isolated atoms. Each variant is a quotient of sums that add over blocks, micro-batches and
ranks: reduce first, divide last.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from hpcmlip.batch import AtomsBatch, Prediction

EPS = 1e-16
"""eV^2; keeps 0/0 from NaN where both terms vanish. Terms that small, 10 neV, are rounding of float32."""


def sums(batch: AtomsBatch, prediction: Prediction, variant: str) -> Tensor:
    """[L, T - 1, 2] float64: numerator and denominator of each level and order, additive and differentiable.

    Structures of weight 0 do not count. `variant` is one of `VARIANTS`.
    """
    square = prediction.terms.double().square()  # [A, T, L]
    pair = VARIANTS[variant](batch, square[:, 1:], square[:, 1:] + square[:, :-1])
    return torch.stack(pair, dim=-1).transpose(0, 1)


def value(totals: Tensor) -> Tensor:
    """[L] from globally added `sums`."""
    return (totals[..., 0] / (totals[..., 1] + EPS)).sum(dim=1)


def _mean_over_structures(batch: AtomsBatch, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """[B, T - 1, L] -> (sum over real structures, their number), each [T - 1, L]."""
    real = (batch.weight > 0)[:, None, None]
    total = torch.where(real, ratio, 0.0).sum(dim=0)
    return total, real.sum().to(total.dtype).expand_as(total)


def _atom(batch: AtomsBatch, above: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    return _mean_over_structures(batch, batch.topology.sum_atoms(above / (both + EPS)))


def _molecule(batch: AtomsBatch, above: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    sum_atoms = batch.topology.sum_atoms
    return _mean_over_structures(batch, sum_atoms(above) / (sum_atoms(both) + EPS))


def _batch(batch: AtomsBatch, above: Tensor, both: Tensor) -> tuple[Tensor, Tensor]:
    real = batch.topology.lift_structures(batch.weight > 0)[:, None, None]
    return torch.where(real, above, 0.0).sum(dim=0), torch.where(real, both, 0.0).sum(dim=0)


VARIANTS: dict[str, Callable[[AtomsBatch, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "atom": _atom,
    "molecule": _molecule,
    "batch": _batch,
}
"""Name in `loss.hierarchicality` -> ([T - 1, L], [T - 1, L]) from E_n^2 and E_n^2 + E_{n-1}^2 [A, T - 1, L]."""
