"""HIP-NN (lmax 0) and HIP-NN-TS (lmax 1, 2): per-level linear heads on one trunk of interaction blocks.

Lubbers, Smith, Barros, J. Chem. Phys. 148, 241715 (2018); Chigaev et al., J. Chem. Phys. 158, 184108 (2023); several
levels of theory on one trunk: Messerly et al. (2025). With the weights of hippynn it gives hippynn's numbers.

Letters: V sensitivities of a layer, M components of the tensors (1, 4 or 9), `in` and F its widths.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear

from hpcmlip.batch import DataSpec
from hpcmlip.config import Count, ModelSection, Positive
from hpcmlip.graph import Graph
from hpcmlip.models.fused import gaussian, norms, product, smooth_relu
from hpcmlip.models.layers import HEAD_UNIT, AtomicOffset, cosine_cutoff, energy_head, one_hot

NEGLIGIBLE = 1e-20
"""Smaller sensitivities are 0. The tails of the Gaussians, and what is multiplied by them, would be denormal float32
numbers, with which processors compute a hundred times slower: with them a training step took 1.7 times as long."""

COMPONENT = "HIP-NN and HIP-NN-TS: hierarchical atomic energies, tensor sensitivities up to lmax 2"


class Config(ModelSection):
    kind: Literal["hipnn"] = "hipnn"
    cutoff: Positive = 6.5
    lmax: Literal[0, 1, 2] = 2
    """Highest tensor order of the messages: 0 is HIP-NN, 1 and 2 are HIP-NN-TS."""
    features: Count = 128
    """Width of all layers."""
    interactions: Count = 2
    """Interaction blocks; each adds a term to the energy."""
    atom_layers: Annotated[int, Field(ge=0)] = 3
    """Dense layers after each interaction layer."""
    sensitivities: Count = 20
    """Radial functions of a layer, Gaussians in 1/r."""
    soft_min: Positive = 0.75
    """Å; centre of the innermost radial function at the start."""
    soft_max: Positive = 5.5
    """Å; centre of the outermost radial function at the start."""
    cusp: Positive = 1e-6
    """Added to the squared norms of vectors and tensors under the root: a finite gradient where they vanish."""
    resnet: bool = True
    """Residual layers; False: the plain layers of the paper."""

    @model_validator(mode="after")
    def _check(self):
        if not self.soft_min < self.soft_max <= self.cutoff:
            raise ValueError(
                f"soft_min {self.soft_min} < soft_max {self.soft_max} <= cutoff {self.cutoff} (Å) does not hold; "
                "the usual choice is soft_max = cutoff - 1"
            )
        return self


class Net(nn.Module):
    """Atomic energies of every level of theory, in additive terms of rising order (E0, then one a block)."""

    def __init__(self, config: Config, spec: DataSpec):
        super().__init__()
        self.lmax, self.cutoff, self.num_elements = config.lmax, config.cutoff, len(spec.elements)
        widths = [len(spec.elements)] + [config.features] * config.interactions
        wrap = Residual if config.resnet else Plain
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                [wrap(Interaction(config, num_in), num_in, config.features)]
                + [wrap(_dense(config.features), config.features, config.features) for _ in range(config.atom_layers)]
            )
            for num_in in widths[:-1]
        )
        self.offset = AtomicOffset(spec)
        self.heads = nn.ModuleList(energy_head(config.features, len(spec.levels)) for _ in range(config.interactions))

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters of each block, then of all heads."""
        return [list(module.parameters()) for module in (*self.blocks, self.heads)]

    def forward(self, species: Tensor, graph: Graph) -> Tensor:
        """[A] element indices -> [A, T, L] eV, T = 1 + number of blocks."""
        z = one_hot(species, self.num_elements, graph.dist.dtype)
        angular = harmonics(graph, self.lmax) * cosine_cutoff(graph, self.cutoff)[..., None]
        terms = [self.offset(species)]
        for (interaction, *atom_layers), head in zip(self.blocks, self.heads, strict=True):
            z = interaction(z, graph, angular)
            for layer in atom_layers:
                z = layer(z)
            terms.append(head(z))
        return torch.stack(terms, dim=1) * HEAD_UNIT


class Interaction(nn.Module):
    """Messages to an atom from its neighbours, reduced to invariants: spec of HIP-NN-TS in the factored form.

    One scalar filter W serves all tensor orders, so only the last sum over neighbours carries the components (M). The
    weights act on the sender's features before anything is known of the receiver (Q):

        Q_j[v, a] = sum_b V[v, a, b] z_j[b]      W_ij[a] = sum_v s_v(r_ij) Q_j[v, a]
        M_i[m, a] = sum_j Y_m(r_ij) W_ij[a]      out = M_0 + t1 sqrt(|M_1|^2 + c) + t2 sqrt(|M_2|^2 + c) + w z + b

    or, where z has few features (the elements), after the sum over neighbours (`sums_first`):

        T_i[m, b, v] = sum_j Y_m(r_ij) z_j[b] s_v(r_ij)      M_i[m, a] = sum_bv V[v, a, b] T_i[m, b, v]
    """

    def __init__(self, config: Config, num_in: int):
        super().__init__()
        F, V = config.features, config.sensitivities
        mu, sigma = initial_sensitivities(V, config.soft_min, config.soft_max)
        self.mu = nn.Parameter(mu.float())  # [V] Å
        self.sigma = nn.Parameter(sigma.float())  # [V] Å
        std = math.sqrt(2.0 / (num_in * (F + V)))  # Glorot's rule on the three-dimensional tensor, as hippynn has it
        self.weight = nn.Parameter(torch.empty(V, F, num_in, dtype=torch.float32).normal_(0.0, std))
        # t1 and t2 [F]: a list, for an empty parameter (lmax 0) is what sharded optimizers trip over
        self.scales = nn.ParameterList(torch.empty(F, dtype=torch.float32).normal_() for _ in range(config.lmax))
        self.own = _dense(F, num_in)
        self.cusp = config.cusp

    def forward(self, z: Tensor, graph: Graph, angular: Tensor) -> Tensor:
        """[A, in], angular [A, K, M] (harmonics times cutoff) -> [A, F]."""
        radial = sensitivities(graph.dist, self.mu, self.sigma)  # [A, K, V], the same for both directions of an edge
        first = sums_first(self.weight.shape, *angular.shape[1:])
        messages = self._sum_and_weigh if first else self._weigh_and_sum
        moments = messages(z, graph, angular, radial)  # [A, M, F]
        scalars, *roots = norms(moments, self.cusp)
        out = self.own(z) + scalars
        for scale, root in zip(self.scales, roots, strict=True):
            out = torch.addcmul(out, scale, root)
        return out

    def _sum_and_weigh(self, z: Tensor, graph: Graph, angular: Tensor, radial: Tensor) -> Tensor:
        A, _, M = angular.shape
        outer = (angular[..., None] * graph.lift(z)[:, :, None]).flatten(2)  # [A, K, M * in]
        sums = product(outer.mT, radial).reshape(A * M, -1)  # [A * M, in * V]
        return (sums @ self.weight.permute(2, 0, 1).flatten(0, 1)).reshape(A, M, -1)

    def _weigh_and_sum(self, z: Tensor, graph: Graph, angular: Tensor, radial: Tensor) -> Tensor:
        V, F, num_in = self.weight.shape
        sent = linear(z, self.weight.reshape(V * F, num_in)).reshape(-1, V, F)
        filtered = graph.swap(product(radial, sent))  # [A, K, F]
        return product(angular.mT, filtered)


def sums_first(weight: Sequence[int], K: int, M: int) -> bool:
    """Is it faster to sum over K neighbours before the weights [V, F, in], for tensors of M components?

    Counted are the multiply-adds of an atom, three times those of small products, for their rate.
    """
    V, F, num_in = weight
    return M * num_in * V * (3 * K + F) < V * num_in * F + 3 * K * F * (V + M)


class Residual(nn.Module):
    """z -> out(softplus(base(z))) + skip(z); skip is the identity, or linear where the width changes."""

    def __init__(self, base: nn.Module, num_in: int, features: int):
        super().__init__()
        self.base = base
        self.out = nn.Linear(features, features, dtype=torch.float32)
        self.skip = (
            nn.Identity() if num_in == features else nn.Linear(num_in, features, bias=False, dtype=torch.float32)
        )

    def forward(self, z: Tensor, *args) -> Tensor:
        return self.out(smooth_relu(self.base(z, *args))) + self.skip(z)


class Plain(nn.Module):
    """z -> softplus(base(z))."""

    def __init__(self, base: nn.Module, _num_in: int, _features: int):
        super().__init__()
        self.base = base

    def forward(self, z: Tensor, *args) -> Tensor:
        return smooth_relu(self.base(z, *args))


def initial_sensitivities(num: int, soft_min: float, soft_max: float) -> tuple[Tensor, Tensor]:
    """(mu, sigma) [V] Å, float64: centres equally spaced in 1/r from `soft_max` down, sigma = 2 V soft_min."""
    mu = 1.0 / torch.linspace(1.0 / soft_max, 1.0 / soft_min, num, dtype=torch.float64)
    return mu, torch.full_like(mu, 2.0 * num * soft_min)


def sensitivities(dist: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """[..., V] radial functions without the cutoff: exp(-(sigma (1/r - 1/mu))^2 / 2) at distances [...] Å.

    Where they are below `NEGLIGIBLE` they are 0.
    """
    return gaussian(linear(dist.reciprocal()[..., None], sigma[:, None], -sigma / mu), NEGLIGIBLE)


def harmonics(graph: Graph, lmax: int) -> Tensor:
    """[A, K, (lmax + 1)^2] of unit vectors u: 1; u; the traceless tensor u u^T - 1/3 in an orthonormal basis.

    The squared Frobenius norm of a sum of such tensors is the plain sum of squares of its five components.
    """
    x, y, z = (graph.vec / graph.dist[..., None]).unbind(-1)
    parts = [torch.ones_like(x)]
    if lmax >= 1:
        parts += [x, y, z]
    if lmax >= 2:
        root2, root6 = math.sqrt(2.0), math.sqrt(6.0)
        parts += [
            root2 * x * y,
            root2 * x * z,
            root2 * y * z,
            (x * x - y * y) / root2,
            (2 * z * z - x * x - y * y) / root6,
        ]
    return torch.stack(parts, dim=-1)


def _dense(features: int, num_in: int | None = None) -> nn.Linear:
    layer = nn.Linear(num_in or features, features, dtype=torch.float32)
    nn.init.xavier_normal_(layer.weight)
    return layer
