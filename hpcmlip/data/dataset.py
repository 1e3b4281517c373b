"""Which labels of which stores a run sees: `Dataset` and the `DataSpec` that follows from it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcmlip import plugins
from hpcmlip.batch import DataSpec
from hpcmlip.data import offsets, plan
from hpcmlip.data.store import GroupMeta, Level, Store, energy_bit, forces_bit, open_store
from hpcmlip.errors import ConfigError
from hpcmlip.neighbours import LARGEST_DENSE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Stores opened for certain levels of theory."""

    stores: tuple[Store, ...]
    spec: DataSpec

    @staticmethod
    def open(paths: Sequence[Path], levels: Mapping[str, str]) -> "Dataset":
        """Open stores for levels given as name -> "E" | "EF".

        Raises ConfigError for a level or forces that no store holds, or where stores contradict each other; DataError
        for a damaged store.
        """
        stores = tuple(open_store(path) for path in paths)
        if any(store.meta.split != stores[0].meta.split for store in stores):
            log.warning(
                "%s were split differently: a molecule held out in one may be trained on in another",
                ", ".join(str(store.path) for store in stores),
            )
        elements = tuple(sorted({z for store in stores for z in store.meta.elements}))
        reference, residual, isolated = [], [], []
        for name, labels in levels.items():
            holders = _holders(stores, name, labels)
            known, base = _isolated(holders, elements)
            fitted = _fit(holders, elements, base)
            # without isolated atoms the fit itself is subtracted and nothing remains
            reference.append(base if known else fitted)
            residual.append(fitted if known else np.zeros_like(fitted))
            isolated.append(known)
        force_levels = tuple(i for i, labels in enumerate(levels.values()) if labels == "EF")
        spec = DataSpec(
            elements=elements,
            levels=tuple(levels),
            force_levels=force_levels,
            reference=np.array(reference),
            residual=np.array(residual),
            isolated=tuple(isolated),
        )
        return Dataset(stores, spec)

    def groups(self, split: str) -> list["Group"]:
        """Groups with the rows of a split that carry at least one wanted label."""
        return [
            Group(index, store, meta, self._rows(store, meta, split))
            for index, store in enumerate(self.stores)
            for meta in store.meta.groups
        ]

    def count(self, split: str) -> int:
        """Structures of a split that carry a wanted label."""
        return sum(group.rows.count for group in self.groups(split))

    def _rows(self, store: Store, meta: GroupMeta, split: str) -> plan.Rows:
        bits = 0
        names = [level.name for level in store.meta.levels]
        for i, name in enumerate(self.spec.levels):
            if name in names:
                bits |= energy_bit(names.index(name))
                bits |= forces_bit(names.index(name)) if i in self.spec.force_levels else 0
        ranges = [(s.start, s.stop) for s in meta.segments if s.split == split and s.labels & bits]
        return plan.wanted_rows(meta.num_atoms, ranges, meta.rows_per_chunk, periodic=store.meta.periodic)


@dataclass(frozen=True)
class Group:
    """The wanted rows of one atom count of one store."""

    store_index: int
    store: Store
    meta: GroupMeta
    rows: plan.Rows

    @property
    def has_lists(self) -> bool:
        """Are its structures computed with neighbour lists, not with all pairs of atoms?"""
        return self.store.meta.periodic or self.meta.num_atoms > LARGEST_DENSE


def _holders(stores: Sequence[Store], name: str, labels: str) -> list[tuple[Store, Level, int]]:
    """Stores that hold a level, with its description and index there."""
    holders = [
        (store, level, index) for store in stores for index, level in enumerate(store.meta.levels) if level.name == name
    ]
    where = ", ".join(str(store.path) for store in stores)
    if not holders:
        known = sorted({level.name for store in stores for level in store.meta.levels})
        raise ConfigError(f"data.levels: no level '{name}' in {where}{plugins.suggest(name, known)}")
    if labels == "EF" and not any(level.has_forces for _, level, _ in holders):
        raise ConfigError(
            f"data.levels: '{name}: EF' asks for forces, but {where} has only energies of it; write '{name}: E'"
        )
    return holders


def _isolated(holders, elements) -> tuple[bool, np.ndarray]:
    """(known?, [E] eV) of the isolated atoms of a level; stores that know them must agree."""
    known = [
        (store, offsets.isolated_energies(level, elements))
        for store, level, _ in holders
        if offsets.knows_isolated(level, elements)
    ]
    if not known:
        return False, np.zeros(len(elements))
    for store, values in known[1:]:
        if not np.allclose(values, known[0][1], rtol=0, atol=1e-6):
            raise ConfigError(
                f"{known[0][0].path} and {store.path} give different isolated-atom energies for one level: "
                "shard them with the same atomic_energies, or give the levels different names"
            )
    return True, known[0][1]


def _fit(holders, elements, base: np.ndarray) -> np.ndarray:
    """[E] eV: least-squares atomic energies of a level over all its stores, after subtraction of `base`."""
    parts = []
    for store, level, index in holders:
        own = store.meta.elements
        columns = [elements.index(z) for z in own]
        done = offsets.isolated_energies(level, own)
        parts.append(
            offsets.spread(offsets.shift(store.meta.offsets[index], base[columns] - done), columns, len(elements))
        )
    return offsets.atomic_energies(offsets.add(parts, len(elements)))[0]
