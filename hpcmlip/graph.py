"""Neighbourhoods: edge tensors [A, K] of A receivers and K neighbour slots, with a mask. No scatter anywhere.

A `Topology` says who may be whose neighbour and travels in the batch; `topology.graph(pos, cutoff)` adds the geometry.
Message passing is `graph.lift` (neighbours' features), arithmetic on [A, K, ...], `graph.sum`. `DenseTopology` serves
molecules of one size: K = N, a neighbour's features are a broadcast and the reversed edge is a transpose.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Topology(ABC):
    """Which atoms form which structure and who may be whose neighbour."""

    num_structures: int

    @abstractmethod
    def graph(self, pos: Tensor, cutoff: float) -> "Graph":
        """Geometry of positions [A, 3] Å: pairs nearer than `cutoff` Å."""

    @abstractmethod
    def sum_atoms(self, x: Tensor) -> Tensor:
        """[A, ...] -> [B, ...]: sum over the atoms of each structure."""

    @abstractmethod
    def lift_structures(self, x: Tensor) -> Tensor:
        """[B, ...] -> [A, ...]: each atom receives the value of its structure."""

    @abstractmethod
    def to(self, device) -> "Topology":
        """The same on another device."""


@dataclass(frozen=True)
class Graph(ABC):
    """Edges i <- j in slots k: geometry and the operations of message passing."""

    vec: Tensor
    """[A, K, 3] Å from receiver i to neighbour j; a unit vector along x where the mask is False."""
    dist: Tensor
    """[A, K] Å; 1 where the mask is False, so that 1/r and its derivatives stay finite."""
    mask: Tensor
    """[A, K] bool: the slot holds a neighbour nearer than the cutoff."""

    @abstractmethod
    def lift(self, x: Tensor) -> Tensor:
        """[A, ...] -> [A, K, ...]: features of the neighbour in each slot."""

    @abstractmethod
    def swap(self, e: Tensor) -> Tensor:
        """[A, K, ...] -> [A, K, ...]: the value of the reversed edge j <- i."""

    @abstractmethod
    def contract(self, weights: Tensor, e: Tensor) -> Tensor:
        """[A, K, M], [A, K, F] -> [A, M, F]: sum over the neighbours of the outer product."""

    def sum(self, e: Tensor) -> Tensor:
        """[A, K, ...] -> [A, ...]: sum over real neighbours; masked slots must already be 0 or are made so."""
        return torch.where(self.mask.reshape(self.mask.shape + (1,) * (e.dim() - 2)), e, 0).sum(dim=1)

    def softmax(self, e: Tensor) -> Tensor:
        """[A, K, ...] -> [A, K, ...]: softmax over real neighbours; all 0 for an atom without any."""
        mask = self.mask.reshape(self.mask.shape + (1,) * (e.dim() - 2))
        # a common shift cancels in the quotient: no derivative needed
        top = e.detach().masked_fill(~mask, -torch.inf).amax(dim=1, keepdim=True).clamp(min=torch.finfo(e.dtype).min)
        weight = torch.where(mask, torch.exp(torch.where(mask, e - top, 0)), 0)
        return weight / weight.sum(dim=1, keepdim=True).clamp(min=torch.finfo(e.dtype).tiny)


@dataclass(frozen=True)
class DenseTopology(Topology):
    """B molecules of N atoms each, atoms flat in order: A = B·N."""

    num_structures: int
    num_atoms: int

    def graph(self, pos: Tensor, cutoff: float) -> "DenseGraph":
        B, N = self.num_structures, self.num_atoms
        x = pos.reshape(B, N, 3)
        vec = x[:, None, :, :] - x[:, :, None, :]  # [B, i, j, 3] = x_j - x_i
        other = ~torch.eye(N, dtype=torch.bool, device=pos.device)
        square = (vec * vec).sum(-1)
        mask = other & (square < cutoff * cutoff)
        # `where` before the root: the diagonal has no derivative
        dist = torch.sqrt(torch.where(mask, square, 1.0))
        along_x = torch.zeros(3, dtype=pos.dtype, device=pos.device)
        along_x[0] = 1.0
        vec = torch.where(mask[..., None], vec, along_x)
        A = B * N
        return DenseGraph(vec=vec.reshape(A, N, 3), dist=dist.reshape(A, N), mask=mask.reshape(A, N))

    def sum_atoms(self, x: Tensor) -> Tensor:
        return x.reshape(self.num_structures, self.num_atoms, *x.shape[1:]).sum(dim=1)

    def lift_structures(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.num_atoms, dim=0)

    def to(self, device) -> "DenseTopology":
        return self


@dataclass(frozen=True)
class DenseGraph(Graph):
    """All pairs of equally sized molecules: slot k of an atom is atom k of its molecule."""

    def lift(self, x: Tensor) -> Tensor:
        N = self.dist.shape[1]
        blocks = x.reshape(-1, 1, N, *x.shape[1:])
        return blocks.expand(-1, N, *blocks.shape[2:]).reshape(x.shape[0], N, *x.shape[1:])

    def swap(self, e: Tensor) -> Tensor:
        N = self.dist.shape[1]
        return e.reshape(-1, N, *e.shape[1:]).transpose(1, 2).reshape(e.shape)

    def contract(self, weights: Tensor, e: Tensor) -> Tensor:
        return torch.bmm(weights.transpose(1, 2), e)
