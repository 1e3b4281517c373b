"""Neighbour lists of periodic or large structures, by the library `vesin`, as padded `ListTopology`."""

import numpy as np
import torch
from vesin import NeighborList

from hpcmlip.graph import DenseTopology, ListTopology, Topology

LARGEST_DENSE = 64
"""Atoms up to which molecules are computed with all their pairs."""


def topology(
    pos: np.ndarray, cutoff: float, *, cell: np.ndarray | None = None, pbc: np.ndarray | None = None
) -> Topology:
    """The form that suits structures [B, N, 3] Å: dense for small molecules, else lists that reach `cutoff` Å.

    `cell` [B, 3, 3] Å and `pbc` [B, 3] as in `neighbour_lists`.
    """
    B, N = pos.shape[:2]
    if N <= LARGEST_DENSE and (pbc is None or not np.any(pbc)):
        return DenseTopology(B, N)
    return neighbour_lists(pos, cutoff, cell=cell, pbc=pbc)


def neighbour_lists(
    pos: np.ndarray, reach: float, *, cell: np.ndarray | None = None, pbc: np.ndarray | None = None
) -> ListTopology:
    """Neighbours nearer than `reach` Å of structures [B, N, 3] Å.

    `cell` [B, 3, 3] Å holds lattice vectors as rows and `pbc` [B, 3] along which of them a structure repeats; without
    them the structures are molecules. The reach may exceed the cell: every image counts. Atoms may lie outside the
    cell. Lengths are float64, to be cast with `.to(dtype=...)`. Raises ValueError for a cell without volume.
    """
    B, N = pos.shape[:2]
    periodic = np.zeros((B, 3), dtype=bool) if pbc is None else np.asarray(pbc, dtype=bool)
    cells = np.stack([_whole_cell(np.zeros((3, 3)) if cell is None else cell[b], periodic[b]) for b in range(B)])
    search = NeighborList(cutoff=reach, full_list=True)
    found = [_edges(search, pos[b], cells[b], periodic[b]) + np.array([b * N, b * N, 0, 0, 0]) for b in range(B)]
    edges = np.concatenate(found)  # i, j, S
    edges = edges[np.lexsort(edges.T[::-1])]
    i, j, steps = edges[:, 0], edges[:, 1], edges[:, 2:]
    counts = np.bincount(i, minlength=B * N)
    K = max(int(counts.max(initial=0)), 1)
    slot = i * K + np.arange(len(i)) - np.repeat(np.cumsum(counts) - counts, counts)
    neighbours, reverse = np.repeat(np.arange(B * N), K), np.arange(B * N * K)
    valid, shift = np.zeros(B * N * K, dtype=bool), np.zeros((B * N * K, 3))
    neighbours[slot], valid[slot] = j, True
    # the reversed edges (j, i, -S) in their own order are the edges in theirs
    backward = np.lexsort((-steps[:, 2], -steps[:, 1], -steps[:, 0], i, j))
    reverse[slot[backward]] = slot
    shift[slot] = np.einsum("es,esx->ex", steps, cells[i // N])

    def shaped(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x.reshape(B * N, K, *x.shape[1:]))

    lattice = bool(periodic.any())
    return ListTopology(
        B,
        N,
        reach,
        shaped(neighbours),
        shaped(reverse),
        shaped(valid),
        shift=shaped(shift) if lattice else None,
        cells=torch.from_numpy(cells) if lattice else None,
    )


def _edges(search: NeighborList, pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """[P, 5] int64: receiver, neighbour, lattice steps of the neighbour, of one structure."""
    box = cell if pbc.any() else np.zeros((3, 3))
    i, j, steps = search.compute(np.asarray(pos, dtype=np.float64), box, pbc, quantities="ijS")
    return np.column_stack([i.astype(np.int64), j.astype(np.int64), steps.astype(np.int64)])


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
