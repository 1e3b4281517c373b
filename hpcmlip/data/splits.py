"""Who is trained on and who is held out: a hash of (seed, key), so that a key's split depends on nothing else.

The same key falls into the same split on every machine, whatever other data there are and in whatever order they come.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

Fractions = tuple[float, float, float]


def of_key(key: str, fractions: Fractions, seed: int) -> int:
    """Split (index into `store.SPLITS`) of a molecule or formula."""
    return int(_place(np.array([_hash(key, seed)], dtype=np.uint64), fractions)[0])


def of_keys(keys: np.ndarray, fractions: Fractions, seed: int) -> np.ndarray:
    """[R] uint8 split of each of R keys (str); each distinct key is hashed once."""
    distinct, where = np.unique(keys, return_inverse=True)
    return np.array([_of_key(str(key), tuple(fractions), seed) for key in distinct], dtype=np.uint8)[where]


def of_rows(group: str, rows: Sequence[int] | np.ndarray, fractions: Fractions, seed: int) -> np.ndarray:
    """[R] uint8 split of single structures: rows of a raw group, each on its own."""
    start = np.uint64(_hash(group, seed))
    with np.errstate(over="ignore"):
        return _place(mix(start + np.asarray(rows).astype(np.uint64)), fractions)


@lru_cache(maxsize=1 << 16)
def _of_key(key: str, fractions: Fractions, seed: int) -> int:
    return of_key(key, fractions, seed)


def _hash(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest(), "little")


def mix(x: np.ndarray) -> np.ndarray:
    """[R] uint64 -> [R] uint64, finalizer of SplitMix64 (Steele, Lea, Flood 2014): neighbours come out unrelated."""
    x = x * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _place(hashes: np.ndarray, fractions: Fractions) -> np.ndarray:
    """[R] uint8: hashes [R] uint64, read as numbers in [0, 1), against the cumulative fractions."""
    train, val, test = fractions
    # rounding must not give a sliver to a split whose fraction is 0
    edges = np.array([train if val or test else 1.0, train + val if test else 1.0])
    uniform = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.searchsorted(edges, uniform, side="right").astype(np.uint8)
