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
from hpcmlip.lattice import needs_lists

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

    def num_labels(self, split: str) -> dict[tuple[str, str], int]:
        """{(level, "energy" | "forces"): structures of a split that carry this label}, of all wanted ones."""
        found = dict.fromkeys(_wanted(self.spec), 0)
        for store in self.stores:
            bits = _label_bits(store, self.spec)
            for segment in (s for meta in store.meta.groups for s in meta.segments if s.split == split):
                for label, bit in bits.items():
                    found[label] += segment.stop - segment.start if segment.labels & bit else 0
        return found

    def check_labels(self) -> None:
        """Raises ConfigError if a wanted label is nowhere in the training split, or none is in the validation split;
        warns of one that is nowhere in the validation split."""
        for (level, prop), count in self.num_labels("train").items():
            if not count:
                way = f"take '{level}' out of data.levels" if prop == "energy" else f"write '{level}: E'"
                raise ConfigError(
                    f"data.levels: no structure of the training split has {prop} of '{level}', so a model could not "
                    f"learn it: {way}, or shard with another split"
                )
        if not self.count("val"):
            raise ConfigError(
                f"no structure of the validation split carries a label of {', '.join(self.spec.levels)}: "
                "shard with a larger validation fraction, the best model is chosen there"
            )
        for (level, prop), count in self.num_labels("val").items():
            if not count:
                log.warning(
                    "no structure of the validation split has %s of '%s': the best model is chosen without regard to "
                    "it; a larger validation fraction, or a split by conformation, would hold some",
                    *(prop, level),
                )

    def _rows(self, store: Store, meta: GroupMeta, split: str) -> plan.Rows:
        bits = sum(_label_bits(store, self.spec).values())
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
        return needs_lists(self.meta.num_atoms, periodic=self.store.meta.periodic)


def _wanted(spec: DataSpec) -> list[tuple[str, str]]:
    """(level, "energy" | "forces") of all labels asked for."""
    forces = [(spec.levels[i], "forces") for i in spec.force_levels]
    return [(name, "energy") for name in spec.levels] + forces


def _label_bits(store: Store, spec: DataSpec) -> dict[tuple[str, str], int]:
    """(level, "energy" | "forces") -> bit in the store's label masks, of the wanted levels that it holds."""
    bit_of = {"energy": energy_bit, "forces": forces_bit}
    places = {level.name: i for i, level in enumerate(store.meta.levels)}
    return {(name, prop): bit_of[prop](places[name]) for name, prop in _wanted(spec) if name in places}


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
