"""ANI-1 (isayev/ANI1_dataset): eight files `ani_gdb_s0X.h5`, a nested group per molecule, wB97X/6-31G(d) energies.

With `options: {high_energy: true}` the conformations of `coordinatesHE`, which the authors took out of the main list,
come after the others: row Nc + k of a group is its k-th high-energy conformation.
"""

from pathlib import Path

from hpcmlip.preprocess.config import LevelSource
from hpcmlip.preprocess.readers import Levels, RawFile
from hpcmlip.preprocess.readers.ani1x import WB97X_ATOMS
from hpcmlip.preprocess.readers.hdf5 import HIGH_ENERGY, Hdf5File, Layout

COMPONENT = "ANI-1: 22 million conformations of 57 thousand molecules, wB97X/6-31G(d) energies"
ENERGY_UNIT = "Ha"
PRESETS = {"dz": LevelSource(energy="energies", method="wB97X", basis="6-31G(d)", atomic_energies=WB97X_ATOMS)}
DEFAULT_LEVELS = ("dz",)
OPTIONS = {"high_energy": False}


def open_file(path: Path, levels: Levels, options: dict) -> RawFile:
    """An opened file; raises DataError if it is absent, damaged or no HDF5."""
    suffixes = ("", HIGH_ENERGY) if options.get("high_energy") else ("",)
    return Hdf5File(path, levels, Layout(atoms="species", smiles="letters", suffixes=suffixes))
