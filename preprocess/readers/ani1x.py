"""ANI-1x and ANI-1ccx (aiqm/ANI1x_datasets): one file, a group per formula, many levels, NaN where not computed.

Correlation energies are stored as such (`mp2_tz.corr_energy`), so the levels beyond Hartree-Fock are sums. `smiles`
(Nc,) is no key of the release; files of ours have it, and then it names the molecule.
"""

from pathlib import Path

from hpcmlip.preprocess.config import LevelSource
from hpcmlip.preprocess.readers import Levels, RawFile
from hpcmlip.preprocess.readers.hdf5 import Hdf5File, Layout

COMPONENT = "ANI-1x and ANI-1ccx: 5 million conformations, wB97X energies and forces, MP2, CCSD(T)*/CBS"
ENERGY_UNIT = "Ha"

# isolated atoms in Ha, as torchani lists them for these levels (spec 10.3)
WB97X_ATOMS = {"H": -0.4993212, "C": -37.8338334, "N": -54.5732825, "O": -75.0424519}
TZ_ATOMS = {"H": -0.5013925, "C": -37.8459781, "N": -54.5915914, "O": -75.0768759}
CC_ATOMS = {"H": -0.5, "C": -37.780724507998, "N": -54.515992576387, "O": -74.976148184192}


def _wb97x(basis: str, key: str, atoms: dict) -> LevelSource:
    return LevelSource(
        energy=f"{key}.energy", forces=f"{key}.forces", method="wB97X", basis=basis, atomic_energies=atoms
    )


def _hf(size: str) -> LevelSource:
    return LevelSource(energy=f"hf_{size.lower()}.energy", method="HF", basis=f"cc-pV{size}")


def _sum(size: str, method: str, key: str) -> LevelSource:
    return LevelSource(energy=(f"hf_{size.lower()}.energy", f"{key}.corr_energy"), method=method, basis=f"cc-pV{size}")


PRESETS = {
    "dz": _wb97x("6-31G(d)", "wb97x_dz", WB97X_ATOMS),
    "tz": _wb97x("def2-TZVPP", "wb97x_tz", TZ_ATOMS),
    "mp2": _sum("TZ", "MP2", "mp2_tz"),
    "cc": LevelSource(energy="ccsd(t)_cbs.energy", method="CCSD(T)*", basis="CBS", atomic_energies=CC_ATOMS),
    "hf_dz": _hf("DZ"),
    "hf_tz": _hf("TZ"),
    "hf_qz": _hf("QZ"),
    "mp2_dz": _sum("DZ", "MP2", "mp2_dz"),
    "mp2_tz": _sum("TZ", "MP2", "mp2_tz"),
    "mp2_qz": _sum("QZ", "MP2", "mp2_qz"),
    "npno_ccsd(t)_dz": _sum("DZ", "NPNO-CCSD(T)", "npno_ccsd(t)_dz"),
    "npno_ccsd(t)_tz": _sum("TZ", "NPNO-CCSD(T)", "npno_ccsd(t)_tz"),
    "tpno_ccsd(t)_dz": _sum("DZ", "TPNO-CCSD(T)", "tpno_ccsd(t)_dz"),
}
DEFAULT_LEVELS = ("dz", "tz", "mp2", "cc")
OPTIONS: dict = {}


def open_file(path: Path, levels: Levels, options: dict) -> RawFile:
    """An opened file; raises DataError if it is absent, damaged or no HDF5."""
    return Hdf5File(path, levels, Layout(atoms="atomic_numbers", smiles="rows"))
