"""What decides about neighbours, without torch: who needs lists, has a cell a volume, how near do images come?"""

import numpy as np

LARGEST_DENSE = 64
"""Atoms up to which molecules are computed with all their pairs, and a store holds the pairs of each graph."""

FLAT = 0.1
"""Å."""

MOST_BINS = 1e5
"""Of vesin, which merges bins beyond it, and divides by zero where an axis has fewer than it would merge into one."""


def needs_lists(num_atoms: int, *, periodic: bool) -> bool:
    """Are such structures computed with neighbour lists, not with all pairs of atoms?"""
    return periodic or num_atoms > LARGEST_DENSE


def lacks_volume(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """[R] bool of cells [R, 3, 3] Å, rows are lattice vectors, and periodic directions [R, 3] bool.

    True where the vectors along which a structure repeats are not finite or do not span as many dimensions. A lattice
    with layers nearer than `FLAT` counts as flat: its images are without number (is the cell in metres?).
    """
    return np.array([_lacks_volume(c[p]) for c, p in zip(np.asarray(cell), np.asarray(pbc, dtype=bool), strict=True)])


def _lacks_volume(vectors: np.ndarray) -> bool:
    if not len(vectors):
        return False
    if not np.isfinite(vectors).all():
        return True
    extents = np.linalg.svd(vectors, compute_uv=False)
    return bool(extents[-1] < max(FLAT, 1e-6 * extents[0]))


def search_radius(cell: np.ndarray, reach: float) -> float:
    """Radius for vesin's search in a cell [3, 3] Å: `reach` Å, but more where a flat cell would bring it down."""
    heights = np.abs(np.linalg.det(cell)) / np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
    while True:
        bins = np.maximum(np.floor(heights / reach), 1)
        if bins.prod() < 0.9 * MOST_BINS or bins.min() > 2 * (bins.prod() / MOST_BINS) ** (1 / 3):
            return reach
        reach *= 1.5


def nearest_distances(pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray, reach: float) -> np.ndarray:
    """[R] distance of the two nearest atoms of finite positions [R, N, 3] Å, images counted; inf beyond `reach` Å.

    `cell` [R, 3, 3] and `pbc` [R, 3] as above, with a volume.
    """
    from vesin import NeighborList  # few data sets need it

    nearest = np.full(len(pos), np.inf)
    for row, (x, box, periodic) in enumerate(zip(pos, cell, pbc, strict=True)):
        radius = search_radius(box, reach) if periodic.all() else reach
        search = NeighborList(cutoff=radius, full_list=False)
        (distances,) = search.compute(x.astype(np.float64), np.where(periodic[:, None], box, 0), periodic, "d")
        nearest[row] = distances[distances <= reach].min(initial=np.inf)
    return nearest
