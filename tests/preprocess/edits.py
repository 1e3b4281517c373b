"""Ways to spoil a raw file. An edit is a function of an HDF5 file opened for writing, or of the path of a file."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import raw_files

Edit = Callable[[h5py.File], object]


def change(path: Path, *edits: Edit) -> None:
    with h5py.File(path, "a") as file:
        for edit in edits:
            edit(file)


def replace(name: str, make: Callable[[np.ndarray], object]) -> Edit:
    """The dataset `name` becomes make(its values)."""

    def edit(file) -> None:
        values = make(file[name][()])
        del file[name]
        file[name] = values

    return edit


def everywhere(key: str, make: Callable[[np.ndarray], object]) -> Edit:
    """`replace` in all groups that have the key."""

    def edit(file) -> None:
        names = []
        file.visit(lambda name: names.append(name) if name.rpartition("/")[2] == key else None)
        for name in names:
            replace(name, make)(file)

    return edit


def delete(name: str) -> Edit:
    def edit(file) -> None:
        del file[name]

    return edit


def row(name: str, number: int, make: Callable[[np.ndarray], object]) -> Edit:
    """Row `number` of a dataset becomes make(it)."""

    def edit(file) -> None:
        file[name][number] = make(file[name][number])

    return edit


def component(value: float) -> Callable[[np.ndarray], np.ndarray]:
    """One component of an array becomes `value`."""

    def make(x):
        x = np.array(x)
        x.reshape(-1)[1] = value
        return x

    return make


def no_rows(file) -> None:
    """Every group has atoms, but no conformation."""
    for group in file:
        for key in [key for key in file[group] if key != "atomic_numbers"]:
            replace(f"{group}/{key}", lambda values: values[:0])(file)


def only_methane_in_ev(file) -> None:
    for name in set(file) - {"C1H4"}:
        del file[name]
    everywhere("wb97x_dz.energy", lambda e: 27.2 * e)(file)


def odd_names(file) -> None:
    file.move("C1H4", "Méthane ₄ '\"\n")
    file.move("H2O1", "a/b c/H2O1")


def molecule(name: str, numbers: list[int], rows: int = 2, spacing: float | None = None) -> Edit:
    """A further group of the ANI-1x layout; `spacing` (Å) of its atoms on a line, or on a lattice of bonds."""

    def edit(file) -> None:
        group, N = file.create_group(name), len(numbers)
        pos = raw_files.conformations(numbers[:27], rows, np.random.default_rng(N))
        if spacing is not None or N > 27:
            edge = int(np.ceil(N ** (1 / 3))) if spacing is None else 1
            place = np.stack([np.arange(N) % edge, np.arange(N) // edge % edge, np.arange(N) // edge**2], axis=1)
            pos = np.float32((spacing or 1.4) * place) + np.zeros((rows, 1, 1), np.float32)
            pos += np.random.default_rng(N).normal(0, 0.02, pos.shape).astype(np.float32)
        energy = np.full(rows, sum(raw_files.ATOMS[z] for z in numbers))
        group["atomic_numbers"], group["coordinates"] = np.array(numbers, np.uint8), pos
        for key in raw_files.ANI1X_TOTALS:
            group[f"{key}.energy"] = energy
        for key in raw_files.ANI1X_SUMS:
            group[f"{key}.corr_energy"] = energy * 0
        for key in ("wb97x_dz", "wb97x_tz"):
            group[f"{key}.forces"] = np.zeros((rows, N, 3), np.float32)

    return edit


def many_groups(count: int) -> Edit:
    """So many groups of one conformation of hydrogen."""

    def edit(file) -> None:
        molecule("tiny/0", [1, 1], rows=1, spacing=0.74)(file)
        for i in range(1, count):
            file.copy("tiny/0", f"tiny/{i}")

    return edit


def links(file) -> None:
    """A soft link, one to nowhere, an external one, and a group that holds itself."""
    file["soft"] = h5py.SoftLink("/C1H4")
    file["nowhere"] = h5py.SoftLink("/absent")
    file["outside"] = h5py.ExternalLink("absent.h5", "/C1H4")
    file["loop"] = file["/"]


def bomb(file) -> None:
    """A group that claims 10^9 conformations, none of which was ever written."""
    group = file.create_group("bomb")
    group["atomic_numbers"] = np.array([6, 1, 1, 1, 1])
    shapes = {"coordinates": (5, 3), "wb97x_dz.forces": (5, 3), "wb97x_tz.forces": (5, 3)}
    for key in file["C1H4"]:
        if key != "atomic_numbers":
            shape = (10**9, *shapes.get(key, ()))
            group.create_dataset(key, shape, np.float32, chunks=(10**4, *shape[1:]), compression="gzip")
