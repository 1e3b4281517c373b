"""What crosses every border: structures in, predictions out.

Dimension letters, the same everywhere:
B structures, A atoms of the batch (all of them, flat), N atoms of each structure, K neighbour slots of an atom,
E elements, L levels of theory, Lf levels with forces, T additive terms of the energy (HIP-NN's orders), F features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hpcmlip.graph import Topology


@dataclass(frozen=True)
class DataSpec:
    """What a model must know of the data: stored in `model.json`, enough to use the model without the store."""

    elements: tuple[int, ...]
    """Atomic numbers; `AtomsBatch.species` indexes this tuple."""
    levels: tuple[str, ...]
    force_levels: tuple[int, ...]
    """Indices into `levels` of those whose forces are wanted, ascending."""
    reference: np.ndarray
    """[L, E] float64 eV: atomic energies subtracted from the totals before the model sees them (isolated atoms where
    known, otherwise the least-squares fit itself)."""
    residual: np.ndarray
    """[L, E] float64 eV: least-squares atomic energies of the rest on the training split; a model's constant part."""
    isolated: tuple[bool, ...]
    """Per level: is `reference` that of isolated atoms?"""

    def reference_energy(self, species: np.ndarray) -> np.ndarray:
        """[..., L] float64 eV of structures given as element indices [..., N]."""
        return self.reference.T[species].sum(axis=-2)

    def as_json(self) -> dict[str, Any]:
        """Plain values for `model.json`."""
        return {
            "elements": list(self.elements),
            "levels": list(self.levels),
            "force_levels": list(self.force_levels),
            "reference_ev": self.reference.tolist(),
            "residual_ev": self.residual.tolist(),
            "isolated": list(self.isolated),
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> "DataSpec":
        return DataSpec(
            elements=tuple(values["elements"]),
            levels=tuple(values["levels"]),
            force_levels=tuple(values["force_levels"]),
            reference=np.asarray(values["reference_ev"], dtype=np.float64),
            residual=np.asarray(values["residual_ev"], dtype=np.float64),
            isolated=tuple(values["isolated"]),
        )


@dataclass(frozen=True)
class AtomsBatch:
    """Structures that are computed together; a micro-batch is a tuple of these (blocks)."""

    species: Tensor
    """[A] int64, indices into `DataSpec.elements`."""
    pos: Tensor
    """[A, 3] Å, in the dtype of the network."""
    topology: Topology
    """Who may be whose neighbour, and which atoms belong to which structure."""
    energy: Tensor | None
    """[B, L] eV: total minus `DataSpec.reference`; NaN where there is no label. None: no labels at all (prediction)."""
    forces: Tensor | None
    """[A, Lf, 3] eV/Å for `DataSpec.force_levels`; NaN where there is no label."""
    weight: Tensor
    """[B] 1, or 0 for a structure that only fills up the last step."""
    source: np.ndarray
    """[B, 4] store, file, group, row: where each structure came from."""
    force_labels: tuple[int, ...] | None = None
    """Levels, as places in `DataSpec.force_levels`, with any label in `forces`; None: not known, perhaps all. Kept
    here because asking `forces` would make the host wait for a GPU."""

    @property
    def num_structures(self) -> int:
        return self.topology.num_structures

    def to(self, device=None, dtype=None) -> "AtomsBatch":
        """The same batch on a device and, for the floating-point tensors, in a dtype."""

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(device=device, dtype=dtype, non_blocking=True)

        return AtomsBatch(
            species=self.species.to(device=device, non_blocking=True),
            pos=move(self.pos),
            topology=self.topology.to(device, dtype),
            energy=move(self.energy),
            forces=move(self.forces),
            weight=move(self.weight),
            source=self.source,
            force_labels=self.force_labels,
        )


@dataclass(frozen=True)
class Prediction:
    """What a potential says of one `AtomsBatch`."""

    energy: Tensor
    """[B, L] eV, to be compared with `AtomsBatch.energy` (add `DataSpec.reference` for totals)."""
    forces: Tensor | None
    """[A, Lf, 3] eV/Å for the force levels asked for."""
    terms: Tensor
    """[A, T, L] eV: additive contributions of each atom, `energy` is their sum."""
    stress: Tensor | None = None
    """[B, Lf, 3, 3] eV/Å³ for the levels of `forces`, where asked for: dE/dstrain by volume, positive under tension."""
