"""Batches against the raw file: every label, every structure once, the same steps for any number of processes."""

import itertools

import h5py
import numpy as np
import pytest
import torch

from hpcmlip.config import DataSection
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import TrainLoader, split_batches
from hpcmlip.data.store import open_store
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.units import HARTREE

ISOLATED = {  # Ha, spec of the sample
    "dz": [-0.4993212218024081, -37.83307958755662, -54.57213002163017, -75.04146548642689],
    "cc": [-0.49998263377210567, -37.8039652419407, -54.546181008699, -75.0175180584548],
}


def section(store, levels, **settings) -> DataSection:
    return DataSection(stores=(store,), levels=levels, pairs_per_batch=2000, **settings)


def loader(store, streams, num_streams=6, seed=0, levels=None) -> TrainLoader:
    data = section(store, levels or {"dz": "EF", "cc": "E"})
    return TrainLoader(
        Dataset.open([store], data.levels), data, streams=streams, num_streams=num_streams, seed=seed, cutoff=6.5
    )


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_are_those_of_the_raw_file(ab_initio_store, samples, split):
    dataset = Dataset.open([ab_initio_store], {"dz": "EF", "cc": "E"})
    data = section(ab_initio_store, {"dz": "EF", "cc": "E"})
    seen = 0
    with h5py.File(samples["ab_initio"]) as raw:
        paths = sorted(raw)
        for batch in itertools.chain.from_iterable(split_batches(dataset, data, split, cutoff=6.5, rank=0, size=1)):
            N = batch.topology.num_atoms
            assert batch.force_labels == ((0,) if batch.forces.isfinite().any() else ())
            for b, (_, _, ordinal, row) in enumerate(batch.source.tolist()):
                group, atoms = raw[paths[ordinal]], slice(b * N, (b + 1) * N)
                numbers = group["atomic_numbers"][:]
                assert [dataset.spec.elements[s] for s in batch.species[atoms]] == numbers.tolist()
                np.testing.assert_array_equal(batch.pos[atoms].numpy(), group["coordinates"][row])
                for level, key in enumerate(["wb97x_dz.energy", "ccsd(t)_cbs.energy"]):
                    isolated = dict(zip([1, 6, 7, 8], ISOLATED[dataset.spec.levels[level]], strict=True))
                    want = (group[key][row] - sum(isolated[z] for z in numbers.tolist())) * HARTREE
                    assert batch.energy[b, level].item() == pytest.approx(want, rel=3e-7, abs=1e-6)
                want = group["wb97x_dz.forces"][row] * HARTREE
                np.testing.assert_allclose(batch.forces[atoms, 0].numpy(), want, rtol=1e-6, atol=1e-7)
                seen += 1
    assert seen == dataset.count(split) > 0


def test_splits_share_nothing_and_cover_everything(ab_initio_store):
    dataset = Dataset.open([ab_initio_store], {"cc": "E"})
    data = section(ab_initio_store, {"cc": "E"})
    ids = [
        tuple(s)
        for split in ("train", "val", "test")
        for micro in split_batches(dataset, data, split, cutoff=6.5, rank=0, size=1)
        for batch in micro
        for s in batch.source.tolist()
    ]
    assert len(ids) == len(set(ids)) == dataset.stores[0].meta.num_structures == 998


@pytest.mark.parametrize("size", [2, 3, 7])
def test_split_batches_visit_each_structure_once_over_all_ranks(ab_initio_store, size):
    dataset = Dataset.open([ab_initio_store], {"cc": "E"})
    data = section(ab_initio_store, {"cc": "E"})
    parts = [list(split_batches(dataset, data, "val", cutoff=6.5, rank=r, size=size)) for r in range(size)]
    ids = [tuple(s) for part in parts for micro in part for batch in micro for s in batch.source.tolist()]
    assert len(ids) == len(set(ids)) == dataset.count("val")


def step_ids(loader_: TrainLoader, epoch: int, first_step: int = 0) -> list[list[list]]:
    """Per step and micro-batch: sources of the structures with weight."""
    steps = []
    for micro_batches in loader_.batches(epoch, first_step):
        steps.append([[s for b in m for s in b.source[b.weight.numpy() > 0].tolist()] for m in micro_batches])
    loader_.close()
    return steps


def test_an_epoch_holds_each_structure_once(ab_initio_store):
    steps = step_ids(loader(ab_initio_store, range(6)), 3)
    ids = [tuple(s) for step in steps for micro in step for s in micro]
    assert len(ids) == len(set(ids)) == Dataset.open([ab_initio_store], {"cc": "E"}).count("train")


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_steps_do_not_depend_on_the_number_of_processes(ab_initio_store, ranks):
    whole = step_ids(loader(ab_initio_store, range(6)), 1)
    share = 6 // ranks
    parts = [step_ids(loader(ab_initio_store, range(r * share, (r + 1) * share)), 1) for r in range(ranks)]
    assert [[m for part in parts for m in part[t]] for t in range(len(whole))] == whole


def test_an_epoch_can_be_entered_at_any_step(ab_initio_store):
    whole = step_ids(loader(ab_initio_store, range(6)), 2)
    assert step_ids(loader(ab_initio_store, range(6)), 2, first_step=len(whole) // 2) == whole[len(whole) // 2 :]


def test_epochs_follow_each_other_from_one_thread(ab_initio_store):
    running = loader(ab_initio_store, range(6))
    in_a_row = [[b.source.tolist() for m in s for b in m] for e in range(3) for s in running.batches(e)]
    running.close()
    fresh = [
        [b.source.tolist() for m in s for b in m]
        for e in range(3)
        for s in loader(ab_initio_store, range(6)).batches(e)
    ]
    assert in_a_row == fresh
    assert running.waited > 0


def test_seed_changes_the_order(ab_initio_store):
    assert step_ids(loader(ab_initio_store, range(6)), 0) != step_ids(loader(ab_initio_store, range(6), seed=1), 0)


def test_a_small_cache_gives_the_same_batches(ab_initio_store):
    data = section(ab_initio_store, {"dz": "EF", "cc": "E"}, cache_mb=0)
    dataset = Dataset.open([ab_initio_store], data.levels)
    small = TrainLoader(dataset, data, streams=range(2), num_streams=2, seed=0, cutoff=6.5)
    large = loader(ab_initio_store, range(2), num_streams=2)
    for a, b in zip(small.batches(0), large.batches(0), strict=True):
        for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
            assert torch.equal(x.pos, y.pos) and torch.equal(x.energy, y.energy) and torch.equal(x.forces, y.forces)
    small.close()
    large.close()


def test_offsets_are_a_least_squares_fit_of_the_training_split(ab_initio_store):
    dataset = Dataset.open([ab_initio_store], {"dz": "EF", "cc": "E"})
    data = section(ab_initio_store, dataset_levels(dataset))
    counts, energies = [], []
    for batch in itertools.chain.from_iterable(
        split_batches(dataset, data, "train", cutoff=6.5, rank=0, size=1, dtype=torch.float64)
    ):
        species = batch.species.reshape(batch.num_structures, -1).numpy()
        counts.append(np.stack([(species == e).sum(1) for e in range(4)], axis=1))
        energies.append(batch.energy.numpy())
    fit = np.linalg.lstsq(np.concatenate(counts), np.concatenate(energies), rcond=None)[0].T
    np.testing.assert_allclose(dataset.spec.residual, fit, atol=1e-8)
    assert dataset.spec.isolated == (True, True)
    np.testing.assert_allclose(dataset.spec.reference, np.array([ISOLATED["dz"], ISOLATED["cc"]]) * HARTREE, rtol=1e-12)


def dataset_levels(dataset: Dataset) -> dict[str, str]:
    return {n: "EF" if i in dataset.spec.force_levels else "E" for i, n in enumerate(dataset.spec.levels)}


def test_two_stores_are_one_data_set(ab_initio_store):
    one = Dataset.open([ab_initio_store], {"cc": "E"})
    two = Dataset.open([ab_initio_store, ab_initio_store], {"cc": "E"})
    assert two.count("train") == 2 * one.count("train")
    np.testing.assert_allclose(two.spec.residual, one.spec.residual, atol=1e-8)
    data = section(ab_initio_store, {"cc": "E"})
    stores = {
        s[0] for m in split_batches(two, data, "val", cutoff=6.5, rank=0, size=1) for b in m for s in b.source.tolist()
    }
    assert stores == {0, 1}


def test_unknown_level_and_missing_forces_are_refused(ab_initio_store):
    with pytest.raises(ConfigError, match="did you mean 'cc'"):
        Dataset.open([ab_initio_store], {"ccc": "E"})
    with pytest.raises(ConfigError, match="write 'cc: E'"):
        Dataset.open([ab_initio_store], {"cc": "EF"})


def test_a_damaged_chunk_reaches_the_consumer_as_a_sentence(ab_initio_store, tmp_path):
    import shutil

    copy = tmp_path / "copy.zarr"
    shutil.copytree(ab_initio_store, copy)
    store = open_store(copy)
    group = max(store.meta.groups, key=lambda g: g.rows)
    shard = next((copy / group.path / "pos" / "c").rglob("*/0"))
    shard = shard if shard.is_file() else next(p for p in shard.rglob("*") if p.is_file())
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 3] ^= 0x10
    shard.write_bytes(raw)
    with pytest.raises(DataError, match=f"{group.path}/pos"):
        step_ids(loader(copy, range(1), num_streams=1), 0)
    shard.unlink()
    with pytest.raises(DataError, match="missing"):
        step_ids(loader(copy, range(1), num_streams=1), 0)
