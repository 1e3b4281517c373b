"""Labels that a data set lacks: a level that nothing teaches is refused, one that nothing validates is told."""

import dataclasses
import logging

import pytest

from hpcmlip.data.dataset import Dataset
from hpcmlip.data.store import energy_bit, forces_bit, open_store
from hpcmlip.errors import ConfigError

LEVELS = {"dz": "EF", "cc": "E"}


def without(dataset: Dataset, split: str, bits: int) -> Dataset:
    """The data set of one store, as if no structure of a split carried these labels."""
    (store,) = dataset.stores
    groups = tuple(
        dataclasses.replace(
            group,
            segments=tuple(
                dataclasses.replace(s, labels=s.labels & ~bits) if s.split == split else s for s in group.segments
            ),
        )
        for group in store.meta.groups
    )
    changed = dataclasses.replace(store, meta=dataclasses.replace(store.meta, groups=groups))
    return dataclasses.replace(dataset, stores=(changed,))


@pytest.fixture
def dataset(ab_initio_store) -> Dataset:
    return Dataset.open([ab_initio_store], LEVELS)


def test_labels_are_counted(dataset, ab_initio_store):
    expected = {("dz", "energy"): 0, ("cc", "energy"): 0, ("dz", "forces"): 0}
    meta = open_store(ab_initio_store).meta
    for group in meta.groups:
        for s in group.segments:
            for (name, prop), bit in zip(expected, (energy_bit, energy_bit, forces_bit), strict=True):
                has = s.split == "train" and s.labels & bit(meta.level_index(name))
                expected[name, prop] += s.stop - s.start if has else 0
    assert dataset.num_labels("train") == expected and all(expected.values())


def test_a_level_without_training_labels_is_refused(dataset):
    dataset.check_labels()
    with pytest.raises(ConfigError, match=r"no structure of the training split has energy of 'cc'.*take 'cc' out"):
        without(dataset, "train", energy_bit(1)).check_labels()
    with pytest.raises(ConfigError, match=r"has forces of 'dz'.*write 'dz: E'"):
        without(dataset, "train", forces_bit(0)).check_labels()
    with pytest.raises(ConfigError, match="no structure of the validation split carries a label of dz, cc"):
        without(dataset, "val", 0b1111).check_labels()


def test_a_level_without_validation_labels_is_told(dataset, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hpcmlip"), "propagate", True)
    without(dataset, "val", energy_bit(1)).check_labels()
    assert "no structure of the validation split has energy of 'cc'" in caplog.text
