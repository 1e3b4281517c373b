"""COMP6v1 (isayev/COMP6): the benchmark of ANI-1x, a nested group per molecule.

Its `forces` are gradients: the sign turns here.
"""

from pathlib import Path

from hpcmlip.preprocess.config import LevelSource
from hpcmlip.preprocess.readers import Levels, RawFile
from hpcmlip.preprocess.readers.ani1x import WB97X_ATOMS
from hpcmlip.preprocess.readers.hdf5 import Hdf5File, Layout

COMPONENT = "COMP6v1: benchmark of larger molecules, wB97X/6-31G(d) energies and forces"
ENERGY_UNIT = "Ha"
PRESETS = {
    "dz": LevelSource(energy="energies", forces="forces", method="wB97X", basis="6-31G(d)", atomic_energies=WB97X_ATOMS)
}
DEFAULT_LEVELS = ("dz",)
OPTIONS: dict = {}


def open_file(path: Path, levels: Levels, options: dict) -> RawFile:
    """An opened file; raises DataError if it is absent, damaged or no HDF5."""
    return Hdf5File(path, levels, Layout(atoms="species", force_sign=-1.0))
