"""What is evaluated: an ensemble, and the labels of one split of a store that its levels can be compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpcmlip.config import DataSection
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.store import SPLITS, open_store
from hpcmlip.errors import DataError
from hpcmlip.evaluation.members import Ensemble, load_members


@dataclass(frozen=True)
class Task:
    """An ensemble and the data on which it is evaluated."""

    ensemble: Ensemble
    dataset: Dataset
    section: DataSection
    split: str

    @property
    def levels(self) -> tuple[str, ...]:
        return self.dataset.spec.levels

    @property
    def force_levels(self) -> tuple[str, ...]:
        return tuple(self.levels[i] for i in self.dataset.spec.force_levels)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Atom counts of the evaluated structures, ascending."""
        return tuple(sorted({g.meta.num_atoms for g in self.dataset.groups(self.split) if g.rows.count}))


def prepare(runs: Sequence[Path], store: Path, split: str, device: torch.device) -> Task:
    """Load the members and open the store for all levels that both know.

    Raises DataError if they share no level, if an element is unknown to the models, if the store is periodic and they
    are for molecules, or if the split is empty.
    """
    ensemble = load_members(runs, device=device)
    meta = open_store(store).meta
    held = {level.name: level for level in meta.levels}
    wanted = {
        name: "EF" if held[name].has_forces and ensemble.gives_forces(name) else "E"
        for name in ensemble.first.spec.levels
        if name in held
    }
    if not wanted:
        raise DataError(
            f"the models know the levels {', '.join(ensemble.first.spec.levels)}, the store {store} holds "
            f"{', '.join(held)}: nothing to compare"
        )
    ensemble.check_elements(np.array(meta.elements), f"the store {store}")
    if meta.periodic:
        ensemble.check_periodic(f"the store {store}")
    dataset = Dataset.open([Path(store)], wanted)
    if not dataset.count(split):
        counts = ", ".join(f"{name}: {dataset.count(name)}" for name in SPLITS)
        raise DataError(
            f"the split '{split}' of {store} has no structure with a label of {', '.join(wanted)} ({counts})"
        )
    budget = ensemble.first.info["config"]["data"].get(
        "pairs_per_batch", DataSection.model_fields["pairs_per_batch"].default
    )
    section = DataSection(stores=(Path(store),), levels=wanted, pairs_per_batch=budget)
    return Task(ensemble, dataset, section, split)
