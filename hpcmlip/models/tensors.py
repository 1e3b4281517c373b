"""Spherical tensors on a graph: frames of edges, and linear maps between tensors seen in those frames.

Features [A, M, C] hold C tensors of every degree l = 0 ... L, degree by degree: component m = -l ... l of degree l is
row l² + l + m, M = (L + 1)². The basis is e3nn's (degree 1 is x, y, z; the polar axis is y), orthonormal.

In the frame of an edge, whose polar axis is the direction u to the neighbour, a map that turns with the edge couples
only components of equal |m| (Passaro, Zitnick, ICML 2023), and components go by |m|: see `edge_components`. The frame
is fixed but for a turn about u, of which results do not depend: no direction is special, derivatives of all orders are
those of the maps.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from e3nn import o3
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from hpcmlip.graph import Graph


def edge_components(degree: int, order: int) -> list[tuple[int, int]]:
    """(l, m) of the components [n] of tensors in the frame of an edge, l <= `degree`, |m| <= `order`.

    First m = 0 of every degree; then, for m = 1, 2, ..., +m of every degree from m up and -m of the same.
    """
    found = [(ell, 0) for ell in range(degree + 1)]
    for m in range(1, order + 1):
        found += [(ell, sign * m) for sign in (1, -1) for ell in range(m, degree + 1)]
    return found


# ----------------------------------------------------------------------------------------------------------- frames


@dataclass(frozen=True)
class Frames:
    """Rotations into the frames of edges, n = M components of all orders."""

    graph: Graph
    own: Tensor
    """[A, K, n, M]: components in the frame of the edge from those in space."""
    reversed: Tensor
    """[A, K, n, M]: the same for the frame of the reversed edge j <- i."""

    def turn(self, x: Tensor, degree: int) -> Tensor:
        """[A, M, C] -> [A, K, n, C]: an atom's own tensors in the frame of each of its edges."""
        return _turn(_block(self.own, degree, degree), x)

    def turn_neighbours(self, x: Tensor, degree: int) -> Tensor:
        """[A, M, C] -> [A, K, n, C]: the neighbours' tensors in the frame of the edge to them.

        Turned by the sender for all its receivers at once, then sent.
        """
        return self.graph.swap(_turn(_block(self.reversed, degree, degree), x))

    def collect(self, x: Tensor, degree: int, order: int) -> Tensor:
        """[A, K, n, C] -> [A, M, C]: turned back into space and summed; x is 0 where there is no neighbour."""
        return torch.bmm(_block(self.own, degree, order).flatten(1, 2).transpose(1, 2), x.flatten(1, 2))


def _turn(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.bmm(matrix.flatten(1, 2), x).unflatten(1, matrix.shape[1:3])


def _block(matrix: Tensor, degree: int, order: int) -> Tensor:
    """[A, K, n, M] of all degrees -> the part of `degree` and `order`."""
    top = math.isqrt(matrix.shape[-1]) - 1
    if degree == order == top:
        return matrix
    # a piece for m = 0, +1, -1, +2, ... holds the degrees from |m| up
    orders = [(n + 1) // 2 for n in range(2 * top + 1)]
    pieces = matrix[..., : (degree + 1) ** 2].split([top + 1 - m for m in orders], dim=2)
    kept = list(zip(orders, pieces, strict=True))[: 2 * order + 1]
    return torch.cat([piece[:, :, : degree + 1 - m] for m, piece in kept], dim=2)


class EdgeFrames(nn.Module):
    """Frames of the edges of a graph for tensors up to `degree`."""

    def __init__(self, degree: int):
        super().__init__()
        self.degree = degree
        components = edge_components(degree, degree)
        # float64, cast where they are used: a network that is cast to float64 later must have them exact
        for ell in range(1, degree):
            self.register_buffer(f"product{ell + 1}", _product(ell), persistent=False)
        self.register_buffer("by_order", torch.tensor([ell * ell + ell + m for ell, m in components]), persistent=False)
        turned = torch.tensor([(-1.0) ** (ell + (m < 0)) for ell, m in components], dtype=torch.float64)
        self.register_buffer("half_turn", turned, persistent=False)

    def forward(self, graph: Graph) -> Frames:
        rotations = [torch.ones_like(graph.dist)[..., None, None]]
        if self.degree:
            rotations.append(_axes(graph))
        for ell in range(1, self.degree):
            product = getattr(self, f"product{ell + 1}").to(graph.dist.dtype)
            outer = rotations[ell][..., :, :, None, None] * rotations[1][..., None, None, :, :]
            rotations.append((outer.flatten(2) @ product).unflatten(-1, (2 * ell + 3, 2 * ell + 3)))
        M = (self.degree + 1) ** 2
        rows = [pad(rot, (ell * ell, M - (ell + 1) ** 2)) for ell, rot in enumerate(rotations)]
        own = torch.cat(rows, dim=2).index_select(2, self.by_order)
        # the frame of the reversed edge is this one after half a turn about its x axis
        return Frames(graph, own, own * self.half_turn.to(own.dtype)[:, None])


def _axes(graph: Graph) -> Tensor:
    """[A, K, 3, 3]: unit vectors x, y, z of the frame of each edge; y is its direction u, x is even in u."""
    unit = graph.vec / graph.dist[..., None]
    # x is a fixed axis made orthogonal to u, one that is not near u: the same choice for both directions of an edge
    far_from_x = unit[..., 0].abs() < 0.75
    far_from_x = far_from_x & graph.swap(far_from_x)
    along = torch.where(far_from_x, unit[..., 0], unit[..., 2])[..., None]
    axes = torch.eye(3, dtype=unit.dtype, device=unit.device)
    x = (torch.where(far_from_x[..., None], axes[0], axes[2]) - along * unit) / torch.sqrt(1 - along * along)
    return torch.stack([x, unit, torch.linalg.cross(x, unit, dim=-1)], dim=-2)


def _product(ell: int) -> Tensor:
    """[(2l + 1)² · 9, (2l + 3)²]: the rotation of degree l + 1 from the products of those of degrees l and 1."""
    coupling = o3.wigner_3j(ell, 1, ell + 1, dtype=torch.float64) * math.sqrt(2 * ell + 3)
    return torch.einsum("abm,cdn->acbdmn", coupling, coupling).reshape(-1, (2 * ell + 3) ** 2)


# ------------------------------------------------------------------------------------------------------------- maps


class DegreeLinear(nn.Module):
    """Mixes the channels of each degree: what a linear map of an atom's tensors can do without a direction."""

    def __init__(self, degree: int, channels: int):
        super().__init__()
        std = channels**-0.5
        self.weight = nn.Parameter(torch.empty(degree + 1, channels, channels, dtype=torch.float32).normal_(0.0, std))

    def forward(self, x: Tensor) -> Tensor:
        """[A, M, C] -> [A, M, C]."""
        # expanded, not indexed: the derivative is a sum in a fixed order on GPUs too
        weights = torch.cat([weight.expand(2 * ell + 1, -1, -1) for ell, weight in enumerate(self.weight)])
        return torch.bmm(x.transpose(0, 1), weights).transpose(0, 1)


class EdgeKernel(nn.Module):
    """Linear maps of tensors in the frame of an edge that commute with turns about it, weighted by radial functions.

    To each of the degrees in `outputs`, from tensors up to `degree`; for every |m|, over all degrees and channels,

        (y_m, y_-m) = (A_m z_m - B_m z_-m, B_m z_m + A_m z_-m),    z = rho(r) x,

    with B = 0 for m = 0. With `even` B = 0 altogether: the map commutes with mirror planes through the edge, too.
    """

    def __init__(self, degree: int, outputs: Sequence[int], channels: int, *, even: bool):
        super().__init__()
        self.degree, self.outputs, self.channels = degree, tuple(outputs), channels
        self.weights = nn.ParameterList()
        for m in range(degree + 1):
            parts = 1 if even or m == 0 else 2
            num_in, num_out = (degree + 1 - m) * channels, sum(self._widths(m))
            std = (parts * num_in) ** -0.5
            self.weights.append(torch.empty(parts, num_out, num_in, dtype=torch.float32).normal_(0.0, std))

    @property
    def num_radial(self) -> int:
        """Radial functions of a channel: one for each degree and |m| of the input."""
        return (self.degree + 1) * (self.degree + 2) // 2

    def forward(self, x: Tensor, radial: Tensor) -> list[Tensor]:
        """[A, K, n, C], radial [A, K, num_radial, C] -> for each output [A, K, n', C], orders up to `degree`."""
        found: list[list[Tensor]] = [[] for _ in self.outputs]
        rows = [self.degree + 1 - m for m in range(self.degree + 1)]
        parts = x.split([(2 if m else 1) * num for m, num in enumerate(rows)], dim=2)
        for m, (weight, part, rho) in enumerate(zip(self.weights, parts, radial.split(rows, dim=2), strict=True)):
            z = (part.unflatten(2, (-1, rows[m])) * rho[:, :, None]).flatten(3)
            if len(weight) == 1:
                y = linear(z, weight[0])
            else:
                y = linear(z.flatten(2), _complex(weight)).unflatten(2, (2, -1))
            for output, piece in zip(found, y.split(self._widths(m), dim=-1), strict=True):
                output.append(piece.reshape(*x.shape[:2], -1, self.channels))
        return [torch.cat(output, dim=2) for output in found]

    def _widths(self, m: int) -> list[int]:
        return [max(degree + 1 - m, 0) * self.channels for degree in self.outputs]


def _complex(weight: Tensor) -> Tensor:
    """[2, out, in] A and B -> [2 out, 2 in], the product with A + iB of real and imaginary part."""
    a, b = weight
    return torch.cat([torch.cat([a, -b], dim=1), torch.cat([b, a], dim=1)])
