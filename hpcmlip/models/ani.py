"""ANI: atomic environment vectors (symmetry functions of Behler and Parrinello) and a dense network for each element.

Smith, Isayev, Roitberg, Chem. Sci. 8, 3192 (2017); defaults as in ANI-1x, J. Chem. Phys. 148, 241733 (2018). Values and
order of the environment vector are those of torchani, so that weights trained there would fit.

Letters: K' nearest slots, within the angular cutoff; P pairs of them; D length of the environment vector.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from hpcmlip import plugins
from hpcmlip.batch import DataSpec
from hpcmlip.config import Count, ModelSection, Positive
from hpcmlip.graph import Graph
from hpcmlip.models.layers import HEAD_UNIT, AtomicOffset, cosine_cutoff, energy_head, one_hot
from hpcmlip.units import ATOMIC_NUMBERS, SYMBOLS

COMPONENT = "ANI: atomic environment vectors and a network for each element"


class Config(ModelSection):
    kind: Literal["ani"] = "ani"
    cutoff: Positive = 5.2
    """Å, of the radial terms."""
    angular_cutoff: Positive = 3.5
    """Å, of the angular terms."""
    inner: Positive = 0.9
    """Å; centre of the innermost functions. The others follow in equal steps, which end one short of the cutoff."""
    radial_shifts: Count = 16
    radial_eta: Positive = 16.0
    """1/Å²; sharpness of the radial Gaussians."""
    angular_shifts: Count = 4
    angular_eta: Positive = 8.0
    """1/Å²; sharpness of the Gaussians in the mean distance of a pair of neighbours."""
    angles: Count = 8
    zeta: Positive = 32.0
    """Sharpness in the angle."""
    hidden: tuple[Count, ...] = (128, 112, 96)
    """Widths of the hidden layers."""
    hidden_of: dict[str, tuple[Count, ...]] = {"H": (160, 128, 96), "C": (144, 112, 96)}
    """Chemical symbol -> widths of its own, as many as in `hidden`."""

    @field_validator("hidden_of")
    @classmethod
    def _check_symbols(cls, value: dict):
        for symbol in value:
            if symbol not in ATOMIC_NUMBERS:
                raise ValueError(f"'{symbol}' is no chemical symbol{plugins.suggest(symbol, ATOMIC_NUMBERS)}")
        return value

    @model_validator(mode="after")
    def _check(self):
        if not self.inner < self.angular_cutoff <= self.cutoff:
            raise ValueError(
                f"inner {self.inner} < angular_cutoff {self.angular_cutoff} <= cutoff {self.cutoff} (Å) does not hold"
            )
        for symbol, widths in self.hidden_of.items():
            if len(widths) != len(self.hidden):
                raise ValueError(
                    f"hidden_of.{symbol} has {len(widths)} layers, hidden has {len(self.hidden)}: set both"
                )
        return self

    @property
    def not_compiled(self) -> str:
        return (
            "how many pairs of neighbours an atom has, and how many atoms an element, is not known before the positions"
        )


class Net(nn.Module):
    """Atomic energies from the network of each atom's element."""

    def __init__(self, config: Config, spec: DataSpec):
        super().__init__()
        self.environment = Environment(config, len(spec.elements))
        self.offset = AtomicOffset(spec)
        widths = [config.hidden_of.get(SYMBOLS[z], config.hidden) for z in spec.elements]
        self.networks = nn.ModuleList(_network([self.environment.length, *w], len(spec.levels)) for w in widths)

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters of the n-th dense layer of all elements, from the input to the energies."""
        dense = [[module for module in net if isinstance(module, nn.Linear)] for net in self.networks]
        return [[p for module in layer for p in module.parameters()] for layer in zip(*dense, strict=True)]

    def forward(self, species: Tensor, graph: Graph) -> Tensor:
        """[A] element indices -> [A, T = 2, L] eV."""
        counts = torch.bincount(species, minlength=len(self.networks)).tolist()
        order = torch.argsort(species, stable=True)
        # an element without an atom here gets no atoms, not no call: its weights have a gradient, zero
        by_element = _Permute.apply(self.environment(species, graph), order).split(counts)
        energy = torch.cat([net(x) for net, x in zip(self.networks, by_element, strict=True)])
        energy = _Permute.apply(energy, torch.argsort(order))
        return torch.stack([self.offset(species), energy], dim=1) * HEAD_UNIT


class Environment(nn.Module):
    """Atomic environment vectors: for each element radial terms, for each pair of elements angular terms.

        G^R_k  = 1/4 sum_j exp(-eta (r_j - R_k)²) f(r_j)
        G^A_nm = 2 sum_{j<k} ((1 + cos(t - t_m)) / 2)^zeta exp(-eta ((r_j + r_k) / 2 - R_n)²) f(r_j) f(r_k)

    with the cosine cutoffs f and t = arccos(0.95 cos of the angle jik), whose derivative is finite everywhere.
    """

    def __init__(self, config: Config, num_elements: int):
        super().__init__()
        self._config, self._num_elements = config, num_elements
        self._num_pairs = num_elements * (num_elements + 1) // 2
        self.length = num_elements * config.radial_shifts + self._num_pairs * config.angular_shifts * config.angles

    def forward(self, species: Tensor, graph: Graph) -> Tensor:
        """[A] element indices -> [A, D]."""
        neighbours = graph.lift(species)  # [A, K]
        return torch.cat([self._radial(neighbours, graph), self._angular(neighbours, graph)], dim=1)

    def _radial(self, neighbours: Tensor, graph: Graph) -> Tensor:
        c = self._config
        shifts = _shifts(graph, c.inner, c.cutoff, c.radial_shifts)
        terms = torch.exp(-c.radial_eta * (graph.dist[..., None] - shifts).square())
        terms = terms * (0.25 * cosine_cutoff(graph, c.cutoff))[..., None]
        return graph.contract(one_hot(neighbours, self._num_elements, terms.dtype), terms).flatten(1)

    def _angular(self, neighbours: Tensor, graph: Graph) -> Tensor:
        c = self._config
        near = pairs(graph, neighbours, c.angular_cutoff)
        E, dtype = self._num_elements, graph.dist.dtype
        # pairs last: products of short rows are slow
        shifts = _shifts(graph, c.inner, c.angular_cutoff, c.angular_shifts)[:, None]
        radial = torch.exp(-c.angular_eta * (near.dist[:, None] - shifts).square()) * (2 * near.cutoff)[:, None]
        angles = math.pi / c.angles * (torch.arange(c.angles, dtype=dtype, device=shifts.device) + 0.5)[:, None]
        cos = 0.95 * near.cos
        sin = torch.sqrt(1 - cos.square())
        # cos(t - t_m) without t: nothing here is singular
        shifted = cos[:, None] * torch.cos(angles) + sin[:, None] * torch.sin(angles)
        angular = (0.5 + 0.5 * shifted) ** c.zeta
        terms = (radial[:, :, None] * angular[:, None]).flatten(1, 2)  # [A, F, P]
        # unordered pairs of elements s <= t, in the order of the upper triangle
        s, t = torch.minimum(*near.elements), torch.maximum(*near.elements)
        of_pair = one_hot(s * (2 * E - 1 - s) // 2 + t, self._num_pairs, dtype)
        return torch.bmm(terms, of_pair).transpose(1, 2).flatten(1)


@dataclass(frozen=True)
class Pairs:
    """Unordered pairs of neighbours of an atom within a radius; each tensor is [A, P]."""

    cos: Tensor
    """Of the angle at the atom."""
    dist: Tensor
    """Å, mean of the two."""
    cutoff: Tensor
    """Product of the two cutoff functions, 0 where there is no pair."""
    elements: tuple[Tensor, Tensor]
    """Element indices."""


def pairs(graph: Graph, neighbours: Tensor, radius: float) -> Pairs:
    """Pairs nearer than `radius` Å to their atom, given the elements [A, K] in the slots of the graph."""
    near = replace(graph, mask=graph.mask & (graph.dist < radius))
    slots = _filled(near.mask)  # [A, K']
    dist, cutoff = near.dist.gather(1, slots), cosine_cutoff(near, radius).gather(1, slots)
    unit = near.vec.gather(1, slots[..., None].expand(-1, -1, 3)) / dist[..., None]
    square = torch.stack(
        [
            torch.bmm(unit, unit.transpose(1, 2)),
            (dist[:, :, None] + dist[:, None, :]) / 2,
            cutoff[:, :, None] * cutoff[:, None, :],
        ],
        dim=1,
    )  # [A, 3, K', K']
    size = slots.shape[1]
    first, second = torch.triu_indices(size, size, 1, device=slots.device)
    # gather, whose adjoint is fast on CPUs too, unlike that of indexing
    cos, dist, cutoff = square.flatten(2).gather(2, (first * size + second).expand(len(square), 3, -1)).unbind(1)
    elements = neighbours.gather(1, slots)
    return Pairs(cos, dist, cutoff, (elements[:, first], elements[:, second]))


def _filled(mask: Tensor) -> Tensor:
    """[A, K] bool -> [A, K'] slots, those with True first; K' is the largest number of these, at least 1."""
    most = max(int(mask.sum(dim=1).max()), 1)
    return torch.argsort(mask.to(torch.uint8), dim=1, descending=True, stable=True)[:, :most]


def _shifts(graph: Graph, inner: float, cutoff: float, num: int) -> Tensor:
    """[num] Å, in the dtype and on the device of the graph."""
    return inner + (cutoff - inner) / num * torch.arange(num, dtype=graph.dist.dtype, device=graph.dist.device)


def _network(sizes: Sequence[int], num_levels: int) -> nn.Sequential:
    """[*, D] -> [*, L] in `HEAD_UNIT`: dense layers of these widths with CELU, and the energy head."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(sizes):
        layer = nn.Linear(num_in, num_out, dtype=torch.float32)
        nn.init.kaiming_normal_(layer.weight, a=1.0)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.CELU(alpha=0.1)]
    return nn.Sequential(*layers, energy_head(sizes[-1], num_levels))


class _Permute(torch.autograd.Function):
    """Rows in another order; the adjoint is the inverse permutation, no sum over indices."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor) -> Tensor:
        ctx.order = order
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Permute.apply(grad, torch.argsort(ctx.order)), None
