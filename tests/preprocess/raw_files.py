"""Writers of each raw layout (spec 9), labelled by a Morse pair potential whose forces are exact."""

from pathlib import Path

import h5py
import numpy as np

DEPTH, WIDTH, LENGTH = 0.15, 1.1, 1.2  # Ha, 1/Å, Å
SYMBOLS = {1: "H", 6: "C", 7: "N", 8: "O", 17: "Cl"}
ATOMS = {1: -0.5, 6: -37.8, 7: -54.6, 8: -75.0, 17: -460.0}
MOLECULES = {"H2O1": [8, 1, 1], "C1H4": [6, 1, 1, 1, 1], "C1H3N1": [6, 7, 1, 1, 1], "C2H4O1": [6, 6, 8, 1, 1, 1, 1]}
ANI1X_SUMS = ("mp2_dz", "mp2_tz", "mp2_qz", "npno_ccsd(t)_dz", "npno_ccsd(t)_tz", "tpno_ccsd(t)_dz")
ANI1X_TOTALS = ("wb97x_dz", "wb97x_tz", "ccsd(t)_cbs", "hf_dz", "hf_tz", "hf_qz")
PER_ATOM = (
    "wb97x_dz.cm5_charges",
    "wb97x_dz.hirshfeld_charges",
    *(f"wb97x_tz.mbis_{name}" for name in ("charges", "dipoles", "quadrupoles", "octupoles", "volumes")),
)


def morse(numbers, pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Energies [R] Ha (isolated atoms included) and forces [R, N, 3] Ha/Å of positions [R, N, 3] Å."""
    vec = pos[:, None, :, :].astype(np.float64) - pos[:, :, None, :]
    dist = np.sqrt((vec**2).sum(-1))
    off = ~np.eye(len(numbers), dtype=bool)
    decay = np.where(off, np.exp(-WIDTH * (dist - LENGTH)), 0)
    energy = 0.5 * (DEPTH * (decay**2 - 2 * decay)).sum(axis=(1, 2)) + sum(ATOMS[z] for z in numbers)
    slope = 2 * DEPTH * WIDTH * (decay - decay**2)  # dV/dr
    unit = vec / np.where(off, dist, 1)[..., None]
    return energy, (slope[..., None] * unit).sum(axis=2)


def conformations(numbers, rows: int, rng: np.random.Generator) -> np.ndarray:
    """[R, N, 3] float32 Å: atoms on a loose lattice, moved a little from row to row."""
    corners = np.array([[x, y, z] for x in range(3) for y in range(3) for z in range(3)], dtype=float)
    base = 1.15 * corners[: len(numbers)]
    return (base + 0.08 * rng.standard_normal((rows, len(numbers), 3))).astype(np.float32)


def labelled(numbers, rows: int, rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, energies, forces; labels are those of the float32 positions that are stored."""
    pos = conformations(numbers, rows, rng)
    return pos, *morse(numbers, pos)


def letters(text: str) -> np.ndarray:
    """One character an entry, as ANI-1 stores symbols and SMILES."""
    return np.array(list(text), dtype="S1")


def symbols(numbers) -> np.ndarray:
    return np.array([SYMBOLS[z] for z in numbers], dtype="S2" if 17 in numbers else "S1")


def write_ani1(path: Path, *, rows: int = 20, high: int = 5, seed: int = 0) -> Path:
    """ANI-1: /gdb11_s03/gdb11_s03-<k>, gzip, high-energy conformations beside; the last molecule has none of those."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        top = file.create_group("gdb11_s03")
        for k, (name, numbers) in enumerate(MOLECULES.items()):
            group = top.create_group(f"gdb11_s03-{k}")
            for suffix, count in (("", rows), ("HE", high if k < 3 else 0)):
                pos, energy, _ = labelled(numbers, count, rng)
                group.create_dataset(f"coordinates{suffix}", data=pos, compression="gzip" if count else None)
                group[f"energies{suffix}"] = energy
            group["species"] = symbols(numbers)
            group["smiles"] = letters(f"[{name}]")
    return path


def write_ani1x(path: Path, *, rows: int = 20, seed: int = 0, molecules=None, smiles: bool = False) -> Path:
    """ANI-1x with all 26 keys; every label but the coordinates is missing somewhere, each key in rows of its own."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        for name, numbers in (molecules or MOLECULES).items():
            group, N = file.create_group(name), len(numbers)
            pos, energy, forces = labelled(numbers, rows, rng)
            group["atomic_numbers"] = np.array(numbers, dtype=np.uint8)
            group["coordinates"] = pos
            if smiles:
                group["smiles"] = np.array([f"[{name}]{i % 3}" for i in range(rows)], dtype="S")
            for i, key in enumerate(ANI1X_TOTALS):
                group[f"{key}.energy"] = _holes(energy + 0.01 * i, i, rows)
            for i, key in enumerate(ANI1X_SUMS):
                group[f"{key}.corr_energy"] = _holes(-0.05 * (i + 1) + 1e-3 * energy, 6 + i, rows)
            for i, key in enumerate(("wb97x_dz", "wb97x_tz")):
                group[f"{key}.forces"] = _holes(forces.astype(np.float32), 12 + i, rows)
                group[f"{key}.dipole"] = _holes(np.zeros((rows, 3), np.float32), 14 + i, rows)
            group["wb97x_dz.quadrupole"] = np.full((rows, 6), np.nan, np.float32)
            for key in PER_ATOM:
                group[key] = np.full((rows, N), np.nan, np.float32)
    return path


def _holes(values: np.ndarray, which: int, rows: int) -> np.ndarray:
    """NaN in the rows `which`, `which` + 17, ...; row 16 keeps every label."""
    values = values.copy()
    values[which:rows:17] = np.nan
    return values


def write_comp6(path: Path, *, rows: int = 20, seed: int = 0, sign: float = -1.0) -> Path:
    """COMP6: one top group, a subgroup a molecule; `forces` are gradients (sign -1 times the force)."""
    rng = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        top = file.create_group("s66x8")
        for k, numbers in enumerate(MOLECULES.values()):
            group, N = top.create_group(f"molecule-{k}"), len(numbers)
            pos, energy, forces = labelled(numbers, rows, rng)
            group["coordinates"], group["energies"] = pos, energy
            group["forces"] = (sign * forces).astype(np.float32)
            group["species"] = symbols(numbers)
            for key in ("cm5", "hirshfeld", "spindensities"):
                group[key] = np.zeros((rows, N + 1), np.float32)
            group["hirdipole"] = np.zeros((rows, N + 1, 3), np.float32)
            group["lot"] = np.full(rows, b"wb97x/631gd", dtype="S12")
    return path


def write_config(folder: Path, source: Path | str, reader: str, **settings) -> Path:
    """DATA.yaml beside the file, store `out.zarr` in the same folder. JSON is YAML."""
    import json

    values = {"name": "test", "reader": reader, "sources": [str(source)], "out": "out.zarr", **settings}
    path = folder / "data.yaml"
    path.write_text(json.dumps(values))
    return path
