"""What lies beyond the cutoff, gathered to pseudo-particles on a grid: the far field of `deeppot`.

A pseudo-particle stands for the far atoms in one cell of an axis-aligned grid: their numbers by element, at their
centre. It is particular to the atom that looks at it, for what is far differs. Two kinds:

`Cells` is the grid of the source (a thesis on DeepPot-SE with long range) without its defect of losing the atoms near
the corners of the inner block of cells: each other atom is local or in one cell. Energies jump where an atom crosses a
wall of a cell or the cutoff; forces are the gradient between the jumps.

`Smooth` is free of jumps. Its weights are continuous with their first derivatives, and they are complete: seen from
atom i the shares of an atom j in all pseudo-particles add up to 1 - switch(r_ij), the part of it that is not local.

    share of j in node c of level l, seen from i   h_l(r_ij) B(x_j / d_l - c)       sum_l h_l(r) = 1 - switch(r)
    B(u) = b(u_x) b(u_y) b(u_z)                    b(u) = rise(1 - |u|)             sum_c B(u - c) = 1

Node spacing d_l = 2^l d and window h_l both double from level to level; the grid hangs on the centroid. A far atom
alone in its nodes gives the same energy wherever they lie; only merged atoms feel the orientation of the grid.

Rotations change the energies of both kinds. With random weights and propane at a cutoff of 2 Å they spread, over 24
orientations, 1.4 to 2.4 times (cells) and 0.1 to 0.3 times (smooth) as much as over 24 distortions by 0.05 Å
(test_rotation_is_felt_less_by_the_smooth_kind).

Cost: O(N² C) multiplications for C pseudo-particles, in matrix products.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn.functional import pad

from hpcmlip.batch import DataSpec
from hpcmlip.config import Count, Positive, Section
from hpcmlip.graph import Graph

SMALLEST_WEIGHT = 1e-4
"""Atoms in a node below which its centre passes from theirs to the node itself: no division by 0."""


class LongRange(Section):
    kind: Literal["cells", "smooth"] = "smooth"
    """cells: the hard cells of the source, energies jump at their walls; smooth: weights that overlap, no jumps."""
    spacing: Positive = 3.0
    """Å; edge of a cell, distance of the nodes of the finest grid."""
    levels: Count = 2
    """smooth: grids, each twice as coarse as the one before and for atoms twice as far."""
    features: Count = 8
    """Width of the embedding of a pseudo-particle."""
    axis_features: Count = 2
    """Columns of that embedding in the second factor of the descriptor."""

    @model_validator(mode="after")
    def _check(self):
        if self.kind == "cells" and self.levels != type(self).model_fields["levels"].default:
            raise ValueError("levels has no effect with kind cells, only with smooth: leave it out")
        if self.axis_features > self.features:
            raise ValueError(f"axis_features {self.axis_features} must not exceed features {self.features}")
        return self


@dataclass(frozen=True)
class PseudoParticles:
    """C slots for pseudo-particles of each atom; an empty slot has rows 0 and harmless values."""

    rows: Tensor
    """[A, C, 4]: radial and three angular components, with the weight of the particle."""
    inverse: Tensor
    """[A, C] 1/Å: the radial component without the weight."""
    content: Tensor
    """[A, C, E]: atoms of each element, or their fractions."""


def switch(dist: Tensor, start: float, cutoff: float) -> Tensor:
    """Local weight of neighbours at distances [...] Å: 1 up to `start`, half a cosine period, 0 from `cutoff` on."""
    x = ((dist - start) / (cutoff - start)).clamp(0, 1)
    return 0.5 + 0.5 * torch.cos(math.pi * x)


def rise(x: Tensor) -> Tensor:
    """0 up to x = 0, 1 from x = 1 on, twice differentiable between; rise(x) + rise(1 - x) = 1."""
    x = x.clamp(0, 1)
    return x * x * x * (10 + x * (6 * x - 15))


class Cells(nn.Module):
    """One pseudo-particle for the far atoms of each cell; the grid starts at the smallest coordinates.

    Far is what lies in a cell more than l_max + 1 cells away (along the axis where it is most), or beyond the cutoff
    (l_max + 1 + 1/sqrt(2)) spacing; l_max follows from the cutoff. Membership has no derivative.
    """

    def __init__(self, config: LongRange, spec: DataSpec, _start: float, cutoff: float):
        super().__init__()
        self.spacing, self.cutoff = config.spacing, cutoff
        self.shells = round(cutoff / config.spacing - math.sqrt(0.5))
        self.register_buffer("charges", torch.tensor(spec.elements, dtype=torch.float32), persistent=False)  # [E]

    def cell_index(self, graph: Graph) -> Tensor:
        """[A, 3]: whole numbers."""
        x = graph.topology.by_structure(graph.pos.detach())
        return ((x - x.amin(dim=1, keepdim=True)) / self.spacing).floor().flatten(0, 1)

    def is_local(self, graph: Graph) -> Tensor:
        """[A, K] bool: neighbours in the inner cells; the others belong to the cells, however near they are."""
        index = self.cell_index(graph)
        return (graph.lift(index) - index[:, None]).abs().amax(dim=-1) <= self.shells

    def forward(self, z: Tensor, graph: Graph) -> PseudoParticles:
        """One-hot elements [A, E]; slot j of atom i holds the cell in which j is the first far atom."""
        x, z = graph.topology.by_structure(graph.pos), graph.topology.by_structure(z)
        apart = _differences(graph.topology.by_structure(self.cell_index(graph))).abs().amax(dim=-1)  # [B, i, j]
        square = _differences(x.detach()).square().sum(dim=-1)
        other = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        far = other & ((apart > self.shells) | ~(square < self.cutoff * self.cutoff))
        same = (apart == 0).to(x.dtype)
        earlier = torch.bmm(far.to(x.dtype), same.triu(diagonal=1))  # far atoms in the cell of j before j
        stands = (far & (earlier == 0))[..., None]
        x = x - x.mean(dim=1, keepdim=True)  # small numbers: exact in float32
        sums = gather(far.to(x.dtype), same, torch.cat([z, (z @ self.charges)[..., None] * x], dim=-1))
        counts, moment = sums.split([z.shape[-1], 3], dim=-1)
        centre = moment / torch.where(stands, counts @ self.charges[:, None], 1.0)
        # `where` before the root: what is masked has no derivative
        vec = torch.where(stands, centre - x[:, :, None], 1.0)
        inverse = vec.square().sum(dim=-1, keepdim=True).rsqrt()
        rows = torch.where(stands, torch.cat([inverse, vec * inverse], dim=-1), 0.0)
        return PseudoParticles(rows.flatten(0, 1), inverse[..., 0].flatten(0, 1), counts.flatten(0, 1))


class Smooth(nn.Module):
    """Pseudo-particles with smooth weights on a hierarchy of grids; distances are softened by half a spacing.

    Its centres are weighted by numbers of atoms, not charges, which halves what a rotation changes.
    """

    def __init__(self, config: LongRange, _spec: DataSpec, start: float, cutoff: float):
        super().__init__()
        self.start, self.cutoff = start, cutoff
        self.spacings = [config.spacing * 2**level for level in range(config.levels)]

    def is_local(self, graph: Graph) -> Tensor:
        """[A, K] bool: every neighbour is local with the weight of the switch."""
        return graph.mask

    def windows(self, dist: Tensor) -> list[Tensor]:
        """Distances [...] Å -> weight of each level; their sum is 1 - switch."""
        edges = [self.cutoff * 2**level for level in range(len(self.spacings) - 1)]
        beyond = [1 - switch(dist, self.start, self.cutoff), *(rise(dist / edge - 1) for edge in edges)]
        return [near - far for near, far in pairwise([*beyond, torch.zeros_like(dist)])]

    def forward(self, z: Tensor, graph: Graph) -> PseudoParticles:
        """One-hot elements [A, E]; slots are the nodes of all levels one after the other."""
        x, z = graph.topology.by_structure(graph.pos), graph.topology.by_structure(z)
        x = x - x.mean(dim=1, keepdim=True)
        square = _differences(x).square().sum(dim=-1)
        apart = square > self.start**2
        # nearer pairs have no weight: no root, no derivative
        windows = self.windows(torch.where(apart, square, self.start**2).sqrt())
        levels = [self.level(*level, z, x) for level in zip(windows, self.spacings, strict=True)]
        return PseudoParticles(*(torch.cat(parts, dim=2).flatten(0, 1) for parts in zip(*levels, strict=True)))

    def level(self, far: Tensor, spacing: float, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Far weights [B, i, j] of one level -> rows, inverse and content of its nodes, [B, i, C, ...]."""
        node = occupied_nodes(x.detach() / spacing, (far > 0).any(dim=1))  # [B, C, 3]
        sums = gather(far, shares(x / spacing, node), torch.cat([z, x], dim=-1))
        counts, moment = sums.split([z.shape[-1], 3], dim=-1)
        weight = counts.sum(dim=-1, keepdim=True)
        node = node[:, None] * spacing
        centre = node + (moment - weight * node) / (weight + SMALLEST_WEIGHT)
        vec = centre - x[:, :, None]
        inverse = (vec.square().sum(dim=-1, keepdim=True) + (spacing / 2) ** 2).rsqrt()
        rows = weight * inverse * pad(vec * inverse, (1, 0), value=1.0)
        return rows, inverse[..., 0], counts / (weight + SMALLEST_WEIGHT)


GRIDS = {"cells": Cells, "smooth": Smooth}


def gather(far: Tensor, share: Tensor, content: Tensor) -> Tensor:
    """Far weights [B, i, j], shares of atoms in cells [B, j, C], what an atom brings [B, j, F] -> sums [B, i, C, F]."""
    parts = share[..., None] * content[:, :, None]
    return torch.bmm(far, parts.flatten(2)).unflatten(2, parts.shape[2:])


def shares(u: Tensor, node: Tensor) -> Tensor:
    """Atoms [B, N, 3], nodes [B, C, 3] in units of the spacing -> [B, N, C]; over all nodes they add up to 1."""
    x, y, z = rise(1 - (u[:, :, None] - node[:, None]).abs()).unbind(dim=-1)
    return x * y * z


def occupied_nodes(u: Tensor, wanted: Tensor) -> Tensor:
    """[B, N, 3] in units of the spacing, [B, N] bool -> [B, C, 3]: the nodes that wanted atoms have a share in.

    Each node once; a structure with fewer of them is filled up with a node in which no atom has a share.
    """
    step = torch.arange(2, device=u.device)
    node = u.floor().long()[:, :, None] + torch.cartesian_prod(step, step, step)  # [B, N, 8, 3]
    low = node.amin(dim=(0, 1, 2))
    size = node.amax(dim=(0, 1, 2)) - low + 1
    x, y, z = (node - low).unbind(dim=-1)
    none = size.prod()
    code = torch.where(wanted[..., None], (x * size[1] + y) * size[2] + z, none).flatten(1).sort(dim=1).values
    repeated = torch.zeros_like(code, dtype=torch.bool)
    repeated[:, 1:] = code[:, 1:] == code[:, :-1]
    code = torch.where(repeated, none, code).sort(dim=1).values
    code = code[:, : int((code < none).sum(dim=1).max())]
    plane = size[1] * size[2]
    # `none` becomes x = size[0]: one step beyond the nodes of all atoms
    found = torch.stack([code // plane, code % plane // size[2], code % size[2]], dim=-1)
    return (found + low).to(u.dtype)


def _differences(x: Tensor) -> Tensor:
    """[B, N, 3] -> [B, i, j, 3]: x_j - x_i."""
    return x[:, None] - x[:, :, None]
