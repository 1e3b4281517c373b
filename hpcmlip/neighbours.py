"""Neighbour lists of periodic or large structures, by the library `vesin`, as padded `ListTopology`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from vesin import NeighborList

from hpcmlip.graph import DenseTopology, ListTopology, Topology
from hpcmlip.lattice import needs_lists, search_radius


def topology(
    pos: np.ndarray, cutoff: float, *, cell: np.ndarray | None = None, pbc: np.ndarray | None = None
) -> Topology:
    """The form that suits structures [B, N, 3] Å: dense for small molecules, else lists that reach `cutoff` Å.

    `cell` [B, 3, 3] Å and `pbc` [B, 3] as in `neighbour_lists`.
    """
    B, N = pos.shape[:2]
    if needs_lists(N, periodic=pbc is not None and bool(np.any(pbc))):
        return neighbour_lists(pos, cutoff, cell=cell, pbc=pbc)
    return DenseTopology(B, N)


def neighbour_lists(
    pos: np.ndarray, reach: float, *, cell: np.ndarray | None = None, pbc: np.ndarray | None = None
) -> ListTopology:
    """Neighbours nearer than `reach` Å of structures [B, N, 3] Å.

    `cell` [B, 3, 3] Å holds lattice vectors as rows and `pbc` [B, 3] along which of them a structure repeats; without
    them the structures are molecules. The reach may exceed the cell: every image counts. Atoms may lie outside the
    cell. Lengths are float64, to be cast with `.to(dtype=...)`. Raises ValueError for a cell without volume.
    """
    B, N = pos.shape[:2]
    cells = np.zeros((B, 3, 3)) if cell is None else cell
    periodic = np.zeros((B, 3), dtype=bool) if pbc is None else np.asarray(pbc, dtype=bool)
    return padded([edges(*structure, reach) for structure in zip(pos, cells, periodic, strict=True)], N, reach)


@dataclass(frozen=True)
class Edges:
    """The P edges of one structure, sorted by receiver, neighbour and image."""

    receiver: np.ndarray
    """[P] int32."""
    neighbour: np.ndarray
    """[P] int32."""
    steps: np.ndarray
    """[P, 3] integers, the smallest type that holds them: lattice vectors from the neighbour to the image meant."""
    reverse: np.ndarray
    """[P] int32: number of the reversed edge."""
    cell: np.ndarray | None
    """[3, 3] Å, with unit vectors where the structure does not repeat; None for a molecule."""

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.receiver, self.neighbour, self.steps, self.reverse))


def edges(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray, reach: float) -> Edges:
    """Edges of a structure [N, 3] Å, for the rest as `neighbour_lists`."""
    box = _whole_cell(cell, pbc)
    search = NeighborList(cutoff=search_radius(box, reach) if pbc.all() else reach, full_list=True)
    lattice = box if pbc.any() else np.zeros((3, 3))
    i, j, steps, dist = search.compute(np.asarray(pos, dtype=np.float64), lattice, pbc, quantities="ijSd")
    i, j, steps = (x[dist < reach].astype(np.int64) for x in (i, j, steps))
    # as if all atoms were in the cell: few steps, however far a trajectory has gone
    outside = np.floor(np.asarray(pos, dtype=np.float64) @ np.linalg.inv(box)).astype(np.int64) * pbc
    images = steps + outside[j] - outside[i]
    most = np.abs(images).max(initial=0)
    digits = (len(pos), len(pos), *(2 * most + 1,) * 3)

    def number(receiver: np.ndarray, neighbour: np.ndarray, image: np.ndarray) -> np.ndarray:
        return np.ravel_multi_index((receiver, neighbour, *(image + most).T), digits)

    numbers = number(i, j, images)
    order = np.argsort(numbers)
    return Edges(
        i[order].astype(np.int32),
        j[order].astype(np.int32),
        steps[order].astype(np.min_scalar_type(-int(np.abs(steps).max(initial=0)) - 1)),
        np.searchsorted(numbers[order], number(j, i, -images)[order]).astype(np.int32),
        box if pbc.any() else None,
    )


def padded(structures: Sequence[Edges], num_atoms: int, reach: float) -> ListTopology:
    """Lists of equal length from the edges within `reach` Å of structures of `num_atoms` atoms each."""
    B, N, P = len(structures), num_atoms, [len(each.receiver) for each in structures]
    atom, edge = np.repeat(np.arange(B) * N, P), np.repeat(np.cumsum(P) - P, P)
    i, j, back = (
        np.concatenate([getattr(each, name) for each in structures]) + first
        for name, first in (("receiver", atom), ("neighbour", atom), ("reverse", edge))
    )
    counts = np.bincount(i, minlength=B * N)
    K = max(int(counts.max(initial=0)), 1)
    slot = i * K + np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
    neighbours, reverse = np.repeat(np.arange(B * N), K), np.arange(B * N * K)
    valid = np.zeros(B * N * K, dtype=bool)
    neighbours[slot], reverse[slot], valid[slot] = j, slot[back], True

    def shaped(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.reshape(B * N, K, *x.shape[1:]))

    lists = ListTopology(B, N, reach, shaped(neighbours), shaped(reverse), shaped(valid))
    if all(each.cell is None for each in structures):
        return lists
    cells = [np.eye(3) if each.cell is None else each.cell for each in structures]
    shift = np.zeros((B * N * K, 3))
    shift[slot] = np.concatenate([each.steps @ cell for each, cell in zip(structures, cells, strict=True)])
    return replace(lists, shift=shaped(shift), cells=torch.from_numpy(np.stack(cells)))


def _whole_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """[3, 3] float64: lattice vectors, with orthogonal unit vectors where the structure does not repeat.

    Raises ValueError if those along which it repeats do not span as many dimensions.
    """
    cell = np.asarray(cell, dtype=np.float64).copy()
    cell[~pbc] = 0.0
    repeated = cell[pbc]
    if len(repeated) and np.linalg.matrix_rank(repeated, tol=1e-6 * max(np.abs(repeated).max(), 1e-6)) < len(repeated):
        raise ValueError(f"the cell {cell.tolist()} has no volume along the periodic axes {pbc.tolist()}")
    if not pbc.all():
        # the right singular vectors beyond the rank are orthogonal to all lattice vectors
        cell[~pbc] = np.linalg.svd(repeated if len(repeated) else np.zeros((1, 3)))[2][-(3 - len(repeated)) :]
    return cell
