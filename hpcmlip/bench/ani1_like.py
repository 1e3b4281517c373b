"""Files of ANI-1's layout, size and numbers of molecules, filled with made-up molecules and energies.

ANI-1 itself (Smith, Isayev, Roitberg, Sci. Data 4, 170193 (2017)) cannot be fetched everywhere; what sharding costs
depends on groups, rows, atoms and the entropy of the coordinates, and these are alike: each molecule is a random tree
of C, N and O with some double and triple bonds, saturated with hydrogen, and its conformations are Gaussian
displacements of an embedding without close contacts, stored with gzip in float32.
"""

import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

CONTENTS = {
    1: (3, 10_800, 1_800, 5_400),
    2: (13, 50_962, 480, 8_469),
    3: (20, 151_200, 1_440, 12_960),
    4: (61, 651_936, 2_880, 17_280),
    5: (267, 1_813_151, 2_880, 10_800),
    6: (1_406, 1_682_245, 56, 1_944),
    7: (7_760, 6_460_162, 36, 1_512),
    8: (47_932, 11_236_918, 7, 432),
}
"""Heavy atoms -> molecules, conformations, fewest and most conformations of a molecule: ANI-1 as it was published."""

_VALENCE = {"C": 4, "N": 3, "O": 2, "H": 1}
_SHARE = {"C": 0.70, "N": 0.16, "O": 0.14}
_BOND_ORDERS = {1: 0.72, 2: 0.23, 3: 0.05}
_BOND_SIGNS = {1: "", 2: "=", 3: "#"}
_LENGTH = {True: 1.08, False: 1.45}
"""Å, bonds with and without a hydrogen."""
_AMPLITUDE = 0.05
"""Å, of the displacements."""
_SELF_ENERGY = {"H": -0.500607632585, "C": -37.8302333826, "N": -54.5680045287, "O": -75.0362229210}
"""Ha, from the README of the data set."""
_BINDING = -0.17
"""Ha an atom, typical of organic molecules."""
_STIFFNESS = 0.3
"""Ha/Å²."""
_DIRECTIONS = 32


@dataclass(frozen=True)
class Molecule:
    smiles: str
    symbols: tuple[str, ...]
    pos: np.ndarray
    """[N, 3] Å."""


def write(folder: Path, *, fraction: float = 1.0, processes: int = 1) -> list[Path]:
    """The eight files `ani_gdb_s01.h5` ... in `folder`, with this fraction of the conformations of each molecule."""
    folder.mkdir(parents=True, exist_ok=True)
    heavy = sorted(CONTENTS, reverse=True)  # the largest file takes half of the time
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        return sorted(pool.map(write_file, [folder] * len(heavy), heavy, [fraction] * len(heavy)))


def write_file(folder: Path, heavy: int, fraction: float = 1.0) -> Path:
    """The file of the molecules of so many heavy atoms; the same bytes of data every time."""
    rng = np.random.default_rng([1, heavy])
    path = folder / f"ani_gdb_s{heavy:02d}.h5"
    counts = conformations(rng, *CONTENTS[heavy])
    with h5py.File(path, "w") as file:
        for number, (molecule, count) in enumerate(zip(_molecules(heavy, heavy, len(counts)), counts, strict=True)):
            node = file.create_group(f"gdb11_s{heavy:02d}/gdb11_s{heavy:02d}-{number}")
            _fill(node, rng, molecule, max(round(count * fraction), 1))
    return path


def conformations(rng: np.random.Generator, molecules: int, total: int, fewest: int, most: int) -> np.ndarray:
    """[molecules] int64 that add up to `total`; both extremes occur."""
    mean = (total / molecules - fewest) / (most - fewest)
    counts = fewest + np.round((most - fewest) * rng.beta(2 * mean, 2 * (1 - mean), molecules)).astype(np.int64)
    counts[:2] = fewest, most
    while missing := total - int(counts[2:].sum()) - fewest - most:
        sign = np.sign(missing)
        room = 2 + np.flatnonzero(counts[2:] < most if sign > 0 else counts[2:] > fewest)
        counts[rng.permutation(room)[: abs(missing)]] += sign
    return counts


def _molecules(seed: int, heavy: int, count: int) -> Iterator[Molecule]:
    """Different SMILES, in the order in which they are found."""
    draw, rng, seen = random.Random(seed), np.random.default_rng(seed), set()
    while len(seen) < count:
        smiles, symbols, parents = _tree(draw, heavy)
        if smiles not in seen:
            seen.add(smiles)
            yield Molecule(smiles, symbols, _embed(rng, symbols, parents))


def _tree(draw: random.Random, heavy: int) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """(SMILES, symbols [N], bonded predecessor of each atom [N], -1 for the first)."""
    symbols = draw.choices(*zip(*_SHARE.items(), strict=True), k=heavy)
    free = [_VALENCE[s] for s in symbols]
    parents, orders = [-1], [0]
    for i in range(1, heavy):
        open_ends = [j for j in range(i) if free[j]]
        if not open_ends:  # saturated before its time: another one
            return _tree(draw, heavy)
        j = draw.choice(open_ends)
        order = min(*draw.choices(*zip(*_BOND_ORDERS.items(), strict=True)), free[i], free[j])
        free[i] -= order
        free[j] -= order
        parents.append(j)
        orders.append(order)
    hydrogens = [j for j in range(heavy) for _ in range(free[j])]
    smiles = _smiles(0, symbols, parents, orders)
    return smiles, (*symbols, *("H" for _ in hydrogens)), (*parents, *hydrogens)


def _smiles(atom: int, symbols: list[str], parents: list[int], orders: list[int]) -> str:
    branches = [
        _BOND_SIGNS[orders[j]] + _smiles(j, symbols, parents, orders) for j in range(len(parents)) if parents[j] == atom
    ]
    return symbols[atom] + "".join(f"({branch})" for branch in branches[:-1]) + "".join(branches[-1:])


def _embed(rng: np.random.Generator, symbols: tuple[str, ...], parents: tuple[int, ...]) -> np.ndarray:
    """[N, 3] Å: each atom a bond away from its predecessor, in the direction of most room."""
    pos = np.zeros((len(symbols), 3))
    directions = rng.standard_normal((len(symbols), _DIRECTIONS, 3))
    directions /= np.sqrt(np.square(directions).sum(axis=2, keepdims=True))
    for i, parent in enumerate(parents[1:], start=1):
        places = pos[parent] + _LENGTH["H" in (symbols[i], symbols[parent])] * directions[i]
        room = np.square(places[:, None] - pos[None, :i]).sum(axis=2).min(axis=1)
        pos[i] = places[room.argmax()]
    return pos


def _fill(node: h5py.Group, rng: np.random.Generator, molecule: Molecule, count: int) -> None:
    shift = _AMPLITUDE * rng.standard_normal((count, len(molecule.symbols), 3), dtype=np.float32)
    base = sum(_SELF_ENERGY[s] + _BINDING for s in molecule.symbols)
    energies = base + 0.5 * _STIFFNESS * np.square(shift, dtype=np.float64).sum(axis=(1, 2))
    packed = {"compression": "gzip", "compression_opts": 6}
    node.create_dataset("coordinates", data=molecule.pos.astype(np.float32) + shift, **packed)
    node.create_dataset("energies", data=energies, **packed)
    node.create_dataset("coordinatesHE", data=np.empty((0, *shift.shape[1:]), np.float32))
    node.create_dataset("energiesHE", data=np.empty(0))
    node.create_dataset("species", data=np.array(molecule.symbols, dtype="S1"))
    node.create_dataset("smiles", data=np.array(list(molecule.smiles), dtype="S1"))
