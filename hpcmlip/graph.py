"""Neighbourhoods: edge tensors [A, K] of A receivers and K neighbour slots, with a mask. No scatter anywhere.

A `Topology` says who may be whose neighbour and travels in the batch; `topology.graph(pos, cutoff)` adds the geometry.
Message passing is `graph.lift` (neighbours' features), arithmetic on [A, K, ...], `graph.sum`. Two forms:
`DenseTopology` (small molecules: K = N, a neighbour's features are a broadcast, the reversed edge is a transpose) and
`ListTopology` (periodic or large systems: padded neighbour lists with cell shifts, built by `hpcmlip.neighbours`).
What a slot holds that the mask leaves out is unspecified: multiply by a cutoff function, or sum by `graph.sum`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Topology(ABC):
    """B structures of N atoms each, atoms flat in order (A = B·N), and who may be whose neighbour."""

    num_structures: int
    num_atoms: int

    @abstractmethod
    def graph(self, pos: Tensor, cutoff: float) -> "Graph":
        """Geometry of positions [A, 3] Å: pairs nearer than `cutoff` Å."""

    @abstractmethod
    def to(self, device=None, dtype=None) -> "Topology":
        """The same on another device, lengths in another dtype."""

    @abstractmethod
    def strained(self, strain: Tensor) -> "Topology":
        """The same after the homogeneous deformation 1 + `strain` [B, 3, 3] of all structures."""

    @property
    @abstractmethod
    def cell(self) -> Tensor | None:
        """[B, 3, 3] Å, rows are lattice vectors; None for molecules."""

    def sum_atoms(self, x: Tensor) -> Tensor:
        """[A, ...] -> [B, ...]: sum over the atoms of each structure."""
        return self.by_structure(x).sum(dim=1)

    def lift_structures(self, x: Tensor) -> Tensor:
        """[B, ...] -> [A, ...]: each atom receives the value of its structure."""
        return x.repeat_interleave(self.num_atoms, dim=0)

    def by_structure(self, x: Tensor) -> Tensor:
        """[A, ...] -> [B, N, ...], a view."""
        return x.reshape(self.num_structures, self.num_atoms, *x.shape[1:])


@dataclass(frozen=True)
class Graph(ABC):
    """Edges i <- j in slots k: geometry and the operations of message passing."""

    topology: Topology
    pos: Tensor
    """[A, 3] Å."""
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

    def contract(self, weights: Tensor, e: Tensor) -> Tensor:
        """[A, K, M], [A, K, F] -> [A, M, F]: sum over the neighbours of the outer product.

        One of the two must be 0 where the mask is False.
        """
        return torch.bmm(weights.transpose(1, 2), e)

    def sum(self, e: Tensor) -> Tensor:
        """[A, K, ...] -> [A, ...]: sum over real neighbours."""
        return torch.where(self.mask.reshape(self.mask.shape + (1,) * (e.dim() - 2)), e, 0).sum(dim=1)


def _geometry(vec: Tensor, possible: Tensor, cutoff: float) -> tuple[Tensor, Tensor, Tensor]:
    """(vec, dist, mask) of displacements [..., K, 3], with harmless values where there is no neighbour."""
    square = (vec * vec).sum(-1)
    mask = possible & (square < cutoff * cutoff)
    # `where` before the root: what is masked has no derivative
    dist = torch.sqrt(torch.where(mask, square, 1.0))
    along_x = torch.zeros(3, dtype=vec.dtype, device=vec.device)
    along_x[0] = 1.0
    return torch.where(mask[..., None], vec, along_x), dist, mask


# -------------------------------------------------------------------------------------------------------- dense form


@dataclass(frozen=True)
class DenseTopology(Topology):
    """Molecules, every pair of atoms."""

    cell = None

    def graph(self, pos: Tensor, cutoff: float) -> "DenseGraph":
        N = self.num_atoms
        x = self.by_structure(pos)
        vec = x[:, None, :, :] - x[:, :, None, :]  # [B, i, j, 3] = x_j - x_i
        other = ~torch.eye(N, dtype=torch.bool, device=pos.device)
        vec, dist, mask = _geometry(vec, other, cutoff)
        return DenseGraph(self, pos, vec.reshape(-1, N, 3), dist.reshape(-1, N), mask.reshape(-1, N))

    def to(self, device=None, dtype=None) -> "DenseTopology":
        return self

    def strained(self, strain: Tensor) -> "DenseTopology":
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


# --------------------------------------------------------------------------------------------------------- list form


@dataclass(frozen=True)
class ListTopology(Topology):
    """Neighbour lists of equal length K, filled up; an atom may neighbour several images of another, or of itself.

    Every edge i <- j has its reversed edge j <- i in the list, which makes the adjoint of a gather another gather.
    """

    reach: float
    """Å: every pair nearer than this is in the lists."""
    neighbours: Tensor
    """[A, K] int64: atom in each slot (flat index into the batch); the atom itself in a slot that only fills up."""
    reverse: Tensor
    """[A, K] int64: flat slot index (into A·K) of the reversed edge; its own index for a slot that only fills up."""
    valid: Tensor
    """[A, K] bool: the slot holds an edge."""
    shift: Tensor | None = None
    """[A, K, 3] Å, added to the neighbour's position: its lattice translation. None for molecules."""
    cells: Tensor | None = None
    """[B, 3, 3] Å; None for molecules."""

    @property
    def cell(self) -> Tensor | None:
        return self.cells

    def graph(self, pos: Tensor, cutoff: float) -> "ListGraph":
        """Raises ValueError for a cutoff beyond `reach`."""
        if cutoff > self.reach:
            raise ValueError(f"the neighbour lists reach {self.reach} Å, the model asks for {cutoff} Å")
        vec = _Lift.apply(pos, self) - pos[:, None]
        if self.shift is not None:
            vec = vec + self.shift
        vec, dist, mask = _geometry(vec, self.valid, cutoff)
        return ListGraph(self, pos, vec, dist, mask)

    def to(self, device=None, dtype=None) -> "ListTopology":
        return replace(
            self,
            **{name: getattr(self, name).to(device, non_blocking=True) for name in ("neighbours", "reverse", "valid")},
            **{
                name: None if x is None else x.to(device=device, dtype=dtype, non_blocking=True)
                for name, x in (("shift", self.shift), ("cells", self.cells))
            },
        )

    def strained(self, strain: Tensor) -> "ListTopology":
        if self.shift is None:
            return self
        return replace(
            self,
            shift=self.shift + torch.bmm(self.shift, self.lift_structures(strain)),
            cells=self.cells + torch.bmm(self.cells, strain),
        )

    def gather_atoms(self, x: Tensor) -> Tensor:
        """[A, ...] -> [A, K, ...] of the neighbours; 0 in slots that only fill up. No derivative by itself."""
        lifted = x.index_select(0, self.neighbours.flatten()).reshape(self.neighbours.shape + x.shape[1:])
        return torch.where(self.valid.reshape(self.valid.shape + (1,) * (x.dim() - 1)), lifted, 0)

    def gather_reversed(self, e: Tensor) -> Tensor:
        """[A, K, ...] -> [A, K, ...] of the reversed edges. No derivative by itself."""
        return e.flatten(0, 1).index_select(0, self.reverse.flatten()).reshape(e.shape)


@dataclass(frozen=True)
class ListGraph(Graph):
    """Neighbour lists with geometry."""

    def lift(self, x: Tensor) -> Tensor:
        return _Lift.apply(x, self.topology)

    def swap(self, e: Tensor) -> Tensor:
        return _Swap.apply(e, self.topology)


class _Lift(torch.autograd.Function):
    """Features of the neighbours; its adjoint is `_Collect`: gathers only, so the same bits on every device and run."""

    @staticmethod
    def forward(ctx, x: Tensor, topology: ListTopology) -> Tensor:
        ctx.topology = topology
        return topology.gather_atoms(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Collect.apply(grad, ctx.topology), None


class _Collect(torch.autograd.Function):
    """[A, K, ...] -> [A, ...]: sum over the edges in which an atom is the neighbour."""

    @staticmethod
    def forward(ctx, e: Tensor, topology: ListTopology) -> Tensor:
        ctx.topology = topology
        valid = topology.valid.reshape(topology.valid.shape + (1,) * (e.dim() - 2))
        return torch.where(valid, topology.gather_reversed(e), 0).sum(dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Lift.apply(grad, ctx.topology), None


class _Swap(torch.autograd.Function):
    """Values of the reversed edges: a permutation that is its own inverse."""

    @staticmethod
    def forward(ctx, e: Tensor, topology: ListTopology) -> Tensor:
        ctx.topology = topology
        return topology.gather_reversed(e)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Swap.apply(grad, ctx.topology), None
