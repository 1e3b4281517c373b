"""The ensemble as an ASE calculator: `atoms.calc = EnsembleCalculator(["runs/mf"])`."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from hpcmlip.errors import ConfigError
from hpcmlip.evaluation.members import find_members, load_members
from hpcmlip.evaluation.prediction import default_level, estimate

DTYPES = {"float64": torch.float64, "float32": torch.float32}


class EnsembleCalculator(Calculator):
    """Mean energy, forces and stress of an ensemble at one level of theory, in eV, eV/Å and eV/Å³.

    `models` are run directories or experiment directories (or one of them), `level` defaults to the last level of the
    config. Energies are totals, including the atomic energies of the level, in float64; the network runs in `dtype`
    (float64 by default: energies that are smooth to the last digit; float32 is as accurate against the reference data).
    After a calculation `atoms.calc.results` also holds `energy_std` (eV) and `forces_std` [N, 3] (eV/Å), the standard
    deviation over members, if there are several. There is a stress (xx, yy, zz, yz, xz, xy) for structures that are
    periodic in three directions, unless a model's forces are no gradient of its energy. Raises DataError for structures
    that the models do not cover.
    """

    implemented_properties: ClassVar[list[str]] = ["energy", "free_energy", "forces", "stress"]

    def __init__(
        self,
        models: Sequence[Path | str] | Path | str,
        level: str | None = None,
        device: str = "cpu",
        *,
        dtype: str = "float64",
        **kwargs,
    ):
        super().__init__(**kwargs)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is '{dtype}', expected one of {', '.join(DTYPES)}")
        paths = [models] if isinstance(models, Path | str) else models
        runs = find_members([Path(path) for path in paths]).runs
        self.ensemble = load_members(runs, device=device, dtype=DTYPES[dtype])
        self.level = level or default_level(self.ensemble)
        self.ensemble.check_level(self.level)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes) -> None:
        """ASE's hook: fills `results`."""
        super().calculate(atoms, properties, system_changes)
        (said,) = estimate(self.ensemble, [self.atoms], self.level, first=None)
        self.results = {"energy": said.energy, "free_energy": said.energy, "forces": said.forces}
        if said.stress is not None:
            self.results["stress"] = full_3x3_to_voigt_6_stress(said.stress)
        if said.energy_std is not None:
            self.results |= {"energy_std": said.energy_std, "forces_std": said.forces_std}
        if "stress" in properties and said.stress is None:
            raise PropertyNotImplementedError(
                "no stress: the forces of a model are no gradient of its energy"
                if self.atoms.pbc.all()
                else f"no stress: the structure is not periodic in all three directions (pbc {self.atoms.pbc.tolist()})"
            )
