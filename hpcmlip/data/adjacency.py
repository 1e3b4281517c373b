"""The graph of a molecule as bits: who is nearer than the cutoff to whom."""

import numpy as np


def pack(pos: np.ndarray, cutoff: float) -> np.ndarray:
    """[R, N, 3] float32 Å -> [R, ceil(N·N/8)] uint8: bit i·N+j, most significant first, is dist(i, j) < cutoff, i != j.

    Only float32 subtractions, products and sums in a fixed order: the same bits on every machine.
    """
    square = squared_distances(pos)
    near = square < np.float32(cutoff) ** 2
    N = pos.shape[1]
    near[:, np.arange(N), np.arange(N)] = False
    return np.packbits(near.reshape(len(pos), N * N), axis=1)


def squared_distances(pos: np.ndarray) -> np.ndarray:
    """[R, N, 3] float32 -> [R, N, N] float32."""
    square = np.zeros((pos.shape[0], pos.shape[1], pos.shape[1]), dtype=np.float32)
    for axis in range(3):
        x = np.ascontiguousarray(pos[:, :, axis])
        d = x[:, :, None] - x[:, None, :]
        d *= d
        square += d
    return square
