"""DATA.yaml: which raw files become which store, what in them is which level of theory, and who is held out."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hpcmlip import plugins
from hpcmlip.config import Fraction, LevelName, NonNegative, Positive, Section
from hpcmlip.units import ATOMIC_NUMBERS


class LevelSource(Section):
    """Where one level of theory lies in the raw files."""

    energy: str | tuple[str, ...]
    """Key of the total energy; several keys are summed (MP2 = HF + correlation); NaN in one makes the sum NaN."""
    forces: str | None = None
    """Key of the forces, if the level has them."""
    method: str = ""
    basis: str = ""
    atomic_energies: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    """Energies of the isolated atoms by element symbol, in the energy unit of the file: Ha for the ANI layouts, eV for
    extended XYZ."""

    @property
    def energy_keys(self) -> tuple[str, ...]:
        return (self.energy,) if isinstance(self.energy, str) else self.energy

    @model_validator(mode="after")
    def _check(self):
        if not self.energy_keys or not all(self.energy_keys):
            raise ValueError("needs at least one energy key")
        unknown = set(self.atomic_energies or ()) - set(ATOMIC_NUMBERS)
        if unknown:
            raise ValueError(f"atomic_energies names {sorted(unknown)}, which are no element symbols")
        return self


class SplitConfig(Section):
    """Who is trained on and who is held out. The split is stored with the data and shared by all levels and runs."""

    by: Literal["molecule", "formula", "structure"] = "molecule"
    """`molecule`: SMILES where the file has it, else formula; `structure`: each conformation on its own (conformers of
    one molecule then stand on both sides; only to compare with published in-sample numbers)."""
    fractions: tuple[Fraction, Fraction, Fraction] = (0.8, 0.1, 0.1)
    """Of training, validation and test; `[0, 0, 1]` for a benchmark that nothing is trained on."""
    seed: int = 0

    @model_validator(mode="after")
    def _check(self):
        if abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions must add up to 1, these add up to {sum(self.fractions):g}")
        return self


class DataConfig(Section):
    """DATA.yaml: raw files -> store."""

    path_keys = frozenset({"sources", "out"})
    name: Annotated[str, Field(min_length=1)]
    """Of the data set, for tables and reports."""
    reader: str
    """A file in `preprocess/readers/`."""
    sources: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Raw files, or glob patterns."""
    sha256: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = {}
    """File name of a source -> what its publisher says; HDF5 itself returns some flipped bits as data."""
    out: Path
    """Folder of the store."""
    levels: dict[LevelName, LevelSource | str] = {}
    """Level name -> its keys; a string names one of the reader's presets. Empty: the reader's default levels."""
    cutoff: Positive = 6.5
    """Å; reach of the graphs that a store of molecules holds for other programs. Models find neighbours themselves."""
    elements: tuple[str, ...] = ("H", "C", "N", "O")
    """Elements that are expected; a conformation with another one is bad."""
    min_distance: NonNegative = 0.4
    """Å; a conformation with two atoms closer than this is bad."""
    split: SplitConfig = SplitConfig()
    on_bad: Literal["quarantine", "fail"] = "quarantine"
    """Bad conformations are left out and listed with file, group, row, reason and value, or end the run."""
    check_units: bool = True
    """Numbers that look like another unit than the reader's, or like gradients, end the run; else they are told."""
    options: dict[str, bool | int | float | str] = {}
    """Options of the reader (ANI-1: `high_energy: true`)."""

    @model_validator(mode="after")
    def _check(self):
        unknown = set(self.elements) - set(ATOMIC_NUMBERS)
        if unknown:
            raise ValueError(f"elements names {sorted(unknown)}, which are no element symbols")
        if len(set(self.elements)) != len(self.elements) or not self.elements:
            raise ValueError("elements must name each element once")
        plugins.find("preprocess.readers", self.reader)
        return self
