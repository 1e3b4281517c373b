"""What several models are built of: radial cutoffs, dense layers, the energy readout."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from hpcmlip.batch import DataSpec
from hpcmlip.graph import Graph
from hpcmlip.units import KCAL_PER_MOL

HEAD_UNIT = KCAL_PER_MOL
"""eV. Heads give kcal/mol, converted at once: with O(1) weights the energies start and learn at the scale for which
the usual learning rates and the damping of the heads were found, and weights of runs in kcal/mol fit."""

HEAD_DAMPING = 1e-2
"""Weights of energy heads start at this fraction of the usual initialisation: training starts at the fitted atomic
energies. Biases (some 0.1 kcal/mol an atom) are not damped: their gradients are cancelling sums over all atoms, and a
tensor that starts near 0 would show their rounding a hundredfold."""


# ---------------------------------------------------------------------------------------------------------- cutoffs


def cosine_cutoff(graph: Graph, cutoff: float) -> Tensor:
    """[A, K] (1 + cos(pi r / R)) / 2, 0 where there is no neighbour; its first derivative vanishes at R."""
    return torch.where(graph.mask, torch.cos(graph.dist * (0.5 * math.pi / cutoff)).square(), 0.0)


def polynomial_cutoff(graph: Graph, cutoff: float) -> Tensor:
    """[A, K] 1 - 28 x^6 + 48 x^7 - 21 x^8 with x = r/R, 0 where there is no neighbour (Gasteiger et al. 2020, p = 6).

    Its first and second derivatives vanish at R.
    """
    x = graph.dist / cutoff
    return torch.where(graph.mask, 1 + x**6 * (-28 + x * (48 - 21 * x)), 0.0)


def bump_cutoff(graph: Graph, cutoff: float) -> Tensor:
    """[A, K] exp(3 - 3 / (1 - x²)) with x = r/R, 0 where there is no neighbour; all its derivatives vanish at R."""
    rest = 1 - (graph.dist / cutoff).square()
    inside = graph.mask & (rest > 1e-6)
    return torch.where(inside, torch.exp(3 - 3 / torch.where(inside, rest, 1.0)), 0.0)


# ----------------------------------------------------------------------------------------------------------- layers


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module], *, norm: bool = False) -> nn.Sequential:
    """Dense layers of the given widths, each but the last followed by (LayerNorm and) the activation."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(sizes[:-1]):
        layers += [nn.Linear(num_in, num_out, dtype=torch.float32)]
        layers += [nn.LayerNorm(num_out, dtype=torch.float32)] if norm else []
        layers += [activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1], dtype=torch.float32))


def one_hot(index: Tensor, num: int, dtype: torch.dtype) -> Tensor:
    """[...] -> [..., num] of 0 and 1. Unlike torch's own it does not look at the indices first, for which a GPU would
    have to be waited for."""
    return (index[..., None] == torch.arange(num, device=index.device)).to(dtype)


def energy_head(features: int, num_levels: int) -> nn.Linear:
    """[A, F] -> [A, L] in `HEAD_UNIT`, damped; each level has its own row."""
    head = nn.Linear(features, num_levels, dtype=torch.float32)
    with torch.no_grad():
        head.weight *= HEAD_DAMPING
    return head


class AtomicOffset(nn.Module):
    """Constant energy of an atom of each element at each level: the least-squares fit of the data, never trained."""

    def __init__(self, spec: DataSpec):
        super().__init__()
        self.register_buffer("e0", torch.tensor(spec.residual / HEAD_UNIT, dtype=torch.float32))  # [L, E]

    def forward(self, species: Tensor) -> Tensor:
        """[A] -> [A, L] in `HEAD_UNIT`."""
        return linear(one_hot(species, self.e0.shape[1], self.e0.dtype), self.e0)


class EnergyReadout(nn.Module):
    """Features of an atom -> its energies: the constant term and one learnt term, with a head for every level."""

    def __init__(self, features: int, spec: DataSpec):
        super().__init__()
        self.offset = AtomicOffset(spec)
        self.head = energy_head(features, len(spec.levels))

    def forward(self, species: Tensor, x: Tensor) -> Tensor:
        """[A] element indices, [A, F] -> [A, T = 2, L] eV."""
        return torch.stack([self.offset(species), self.head(x)], dim=1) * HEAD_UNIT
