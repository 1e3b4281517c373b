"""DeepPot-SE with an optional far field: smooth local environments as matrices that rotations leave alone.

Zhang et al., NeurIPS 31 (2018); the far field on a grid and the residual fitting network are those of a thesis on its
long-range extension (`long_range`). Of that thesis the embedding is the symmetric one, one network for all neighbours,
so that energies do not depend on the order of the atoms and one model serves all molecules. SiLU stands for ELU, whose
second derivative jumps, which training on forces would see. There is no dropout: energies would be random, and forces
not their gradient.

Letters: M features of a neighbour, M2 axis features.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from hpcmlip.batch import DataSpec
from hpcmlip.config import Count, ModelSection, Positive
from hpcmlip.graph import Graph
from hpcmlip.models.layers import EnergyReadout, mlp, one_hot
from hpcmlip.models.long_range import GRIDS, LongRange, switch

COMPONENT = "DeepPot-SE: embedded environment matrices, optionally with a far field on a grid"

STEEPNESS = 5.0
"""Weights of s in the embedding start within ±this over the range of s: its features tell distances apart. From
PyTorch's own start, 32 structures of ethanol took 400 steps to the errors that are reached here after 80."""


class Config(ModelSection):
    kind: Literal["deeppot"] = "deeppot"
    cutoff: Positive = 6.0
    switch_width: Positive = 2.0
    """Å inside the cutoff over which neighbours fade."""
    features: Count = 32
    """Width of the embedding of a neighbour."""
    axis_features: Count = 8
    """Columns of the embedding in the second factor of the descriptor."""
    num_neighbors: Positive = 1.0
    """Divides sums over neighbours; 1 as in the source, DeePMD-kit takes the largest number of neighbours."""
    hidden: Count = 128
    """Width of the fitting network."""
    residual_blocks: Annotated[int, Field(ge=0)] = 2
    """Blocks of three layers in the fitting network."""
    long_range: LongRange | None = None
    """Pseudo-particles for what lies beyond the cutoff; null: nothing is seen of it."""

    @property
    def limits(self) -> dict[str, str]:
        if self.long_range is None:
            return {}
        limits = {
            "rotation": "the cells of the far field lie along the axes",
            "reflection": "the cells of the far field lie along the axes",
            "additivity": "the far field has no cutoff",
            "periodic": "the far field is for molecules only, set long_range: null",
        }
        if self.long_range.kind == "cells":
            limits["smooth_cutoff"] = "an atom at the cutoff jumps from the local environment into a cell"
        return limits

    @property
    def not_compiled(self) -> str:
        return "which nodes of the far field are occupied is not known before the positions" if self.long_range else ""

    @model_validator(mode="after")
    def _check(self):
        if self.switch_width >= self.cutoff:
            raise ValueError(f"switch_width {self.switch_width} must be less than the cutoff {self.cutoff} (Å)")
        if self.axis_features > self.features:
            raise ValueError(f"axis_features {self.axis_features} must not exceed features {self.features}")
        far = self.long_range
        if far is not None and far.kind == "cells" and self.cutoff < 1.7 * far.spacing:
            raise ValueError(
                f"long_range.spacing {far.spacing} is too large for the cutoff {self.cutoff} (Å): "
                "cells need (l_max + 1 + 1/√2) spacing with l_max = 0, 1, 2, ..."
            )
        return self


class Net(nn.Module):
    """Atomic energies of every level of theory: the constant term and one learnt term."""

    def __init__(self, config: Config, spec: DataSpec):
        super().__init__()
        self.cutoff, self.start = config.cutoff, config.cutoff - config.switch_width
        self.num_elements = len(spec.elements)
        far = config.long_range
        self.local = Descriptor(
            config.features, config.axis_features, self.num_elements, largest=1.0, num_neighbors=config.num_neighbors
        )
        self.grid = self.far = None
        if far is not None:
            self.grid = GRIDS[far.kind](far, spec, self.start, self.cutoff)
            self.far = Descriptor(far.features, far.axis_features, self.num_elements, largest=1 / self.start)
        width = self.local.width + (0 if far is None else self.far.width)
        blocks = (Residual(config.hidden) for _ in range(config.residual_blocks))
        self.fitting = nn.Sequential(nn.Linear(width, config.hidden, dtype=torch.float32), nn.SiLU(), *blocks)
        self.readout = EnergyReadout(config.hidden, spec)

    def forward(self, species: Tensor, graph: Graph) -> Tensor:
        """[A] element indices -> [A, T = 2, L] eV."""
        z = one_hot(species, self.num_elements, graph.dist.dtype)
        radial, rows = self.environment(graph)
        x = self.local(z, graph.lift(self.local.other(z)), radial, rows)
        if self.grid is not None:
            seen = self.grid(z, graph)
            x = torch.cat([x, self.far(z, self.far.other(seen.content), seen.inverse, seen.rows)], dim=1)
        return self.readout(species, self.fitting(x))

    def environment(self, graph: Graph) -> tuple[Tensor, Tensor]:
        """s(r) = switch(r) / r [A, K] and the rows s (1, x/r, y/r, z/r) [A, K, 4]; 0 where there is no neighbour."""
        local = graph.mask if self.grid is None else graph.mask & self.grid.is_local(graph)
        inverse = 1 / graph.dist
        radial = torch.where(local, switch(graph.dist, self.start, self.cutoff) * inverse, 0.0)
        return radial, radial[..., None] * pad(graph.vec * inverse[..., None], (1, 0), value=1.0)


class Descriptor(nn.Module):
    """Rows R [A, K, 4] around an atom -> D = G^T R R^T G2 [A, M M2], G2 the first M2 columns of G.

    G = embedding(s, own element, other's content) [A, K, M] is the same function for each slot; it acts before the sum
    over the slots, so that their order does not matter. A slot that fades out fades by its row.
    """

    def __init__(
        self, features: int, axis_features: int, num_elements: int, *, largest: float, num_neighbors: float = 1.0
    ):
        super().__init__()
        hidden = 3 * features
        self.own = nn.Linear(num_elements, hidden, dtype=torch.float32)
        self.other = nn.Linear(num_elements, hidden, bias=False, dtype=torch.float32)
        self.radial = nn.Parameter(torch.empty(hidden, dtype=torch.float32).uniform_(-STEEPNESS, STEEPNESS) / largest)
        self.embedding = mlp([hidden, 2 * features, features], nn.SiLU)
        self.axis_features, self.num_neighbors = axis_features, num_neighbors
        self.width = features * axis_features
        self.spread(largest)

    @torch.no_grad()
    def spread(self, largest: float) -> None:
        """First layer bent at values of s drawn from 0 to `largest`, the others by Glorot's rule."""
        self.own.bias.copy_(-self.radial * torch.empty_like(self.radial).uniform_(0, largest))
        for layer in self.embedding:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, other: Tensor, radial: Tensor, rows: Tensor) -> Tensor:
        """One-hot elements [A, E], self.other of the slots' contents [A, K, 3M], s [A, K], rows [A, K, 4]."""
        g = self.embedding(silu(radial[..., None] * self.radial + self.own(z)[:, None] + other))
        moments = torch.bmm(rows.transpose(1, 2), g) / self.num_neighbors  # [A, 4, M]
        return torch.bmm(moments.transpose(1, 2), moments[..., : self.axis_features]).flatten(1)


class Residual(nn.Module):
    """x -> norm(x + three layers of norm(x))."""

    def __init__(self, features: int):
        super().__init__()
        dense = (nn.Linear(features, features, dtype=torch.float32) for _ in range(3))
        layers = [layer for linear in dense for layer in (linear, nn.SiLU())]
        self.layers = nn.Sequential(nn.LayerNorm(features, dtype=torch.float32), *layers)
        self.norm = nn.LayerNorm(features, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.layers(x))
