"""Batches of periodic structures: the graph of a batch gives the labels of the pair potential that ASE computed."""

import itertools

import boxes
import numpy as np
import pytest
import torch

from hpcmlip.config import DataSection
from hpcmlip.data import plan
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import TrainLoader, collate, split_batches
from hpcmlip.data.reader import Cache, Reader
from hpcmlip.graph import DenseTopology, ListTopology


@pytest.fixture(scope="session")
def box_store(tmp_path_factory, cli):
    """160 boxes, slabs and molecules of three sizes; read only."""
    import ase.io

    folder = tmp_path_factory.mktemp("boxes")
    flags = (True, True, (True, True, False), False)
    structures = [atoms for i, pbc in enumerate(flags) for atoms in boxes.boxes(40, i, pbc=pbc)]
    ase.io.write(folder / "raw.xyz", boxes.labelled(structures), format="extxyz")
    (folder / "data.yaml").write_text(
        "{name: boxes, reader: extxyz, sources: [raw.xyz], out: boxes.zarr, split: {by: structure}}"
    )
    cli("shard", folder / "data.yaml", "--workers", 1)
    return folder / "boxes.zarr"


@pytest.fixture
def dataset(box_store) -> Dataset:
    return Dataset.open([box_store], {"reference": "EF"})


def section(store, **settings) -> DataSection:
    return DataSection(stores=(store,), levels={"reference": "EF"}, pairs_per_batch=4000, **settings)


def pair_sums(batch, cutoff: float = boxes.REACH) -> tuple[torch.Tensor, torch.Tensor]:
    """Energies [B] and forces [A, 3] of the pair potential from the graph of a batch."""
    pos = batch.pos.clone().requires_grad_()
    graph = batch.topology.graph(pos, cutoff)
    energy = batch.topology.sum_atoms(graph.sum(boxes.pair_energy(graph.dist)) / 2)
    (slope,) = torch.autograd.grad(energy.sum(), pos)
    return energy.detach(), -slope


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_labels_follow_from_the_graph(box_store, dataset, split):
    batches = split_batches(dataset, section(box_store), split, cutoff=5.0, rank=0, size=1, dtype=torch.float64)
    seen = 0
    for batch in itertools.chain.from_iterable(batches):
        energy, forces = pair_sums(batch)
        species = batch.species.numpy().reshape(batch.num_structures, -1)
        total = batch.energy[:, 0].numpy() + dataset.spec.reference_energy(species)[:, 0]
        np.testing.assert_allclose(energy.numpy(), total, atol=1e-5)  # positions are float32 in the store
        np.testing.assert_allclose(forces.numpy(), batch.forces[:, 0].numpy(), atol=1e-5)
        seen += batch.num_structures
    assert seen == dataset.count(split) > 0


def test_training_batches_are_in_the_dtype_of_the_network(box_store, dataset):
    loader = TrainLoader(dataset, section(box_store), streams=[0], num_streams=1, seed=0, cutoff=5.0)
    for (blocks,) in loader.batches(0):
        for batch in blocks:
            assert isinstance(batch.topology, ListTopology) and batch.topology.reach == 5.0
            assert batch.topology.shift.dtype == batch.topology.cell.dtype == batch.pos.dtype == torch.float32
            energy, _ = pair_sums(batch)
            species = batch.species.numpy().reshape(batch.num_structures, -1)
            total = batch.energy[:, 0].numpy() + dataset.spec.reference_energy(species)[:, 0]
            np.testing.assert_allclose(energy.numpy(), total, atol=1e-4)
    loader.close()


def test_fillers_and_processes(box_store, dataset):
    """More streams than blocks: structures without weight fill up; what enters a step is the same for any number."""

    def steps(streams) -> list:
        loader = TrainLoader(
            dataset, section(box_store, blocks_per_batch=2), streams=streams, num_streams=3, seed=3, cutoff=4.0
        )
        found = [[list(m) for m in step] for epoch in range(2) for step in loader.batches(epoch)]
        loader.close()
        return found

    whole = steps(range(3))
    weights = [batch.weight.sum().item() for step in whole for m in step for batch in m]
    assert sum(weights) == 2 * dataset.count("train")
    for part, streams in ((0, [0]), (1, [1, 2])):
        for mine, all_ in zip(steps(streams), whole, strict=True):
            for a, b in zip(itertools.chain(*mine), itertools.chain(*all_[part : part + len(mine)]), strict=True):
                assert torch.equal(a.pos, b.pos) and torch.equal(a.topology.neighbours, b.topology.neighbours)


def test_a_structure_without_weight_is_still_a_graph(dataset):
    groups = dataset.groups("train")
    reader = Reader(groups, dataset.spec, 5.0, 1e6)
    visit = plan.order(groups[0].rows, group=0, seed=None)
    batch = collate(reader.block(0, 0, visit, 0, 1), torch.float32, cutoff=5.0, weight=0.0)
    assert batch.weight.tolist() == [0.0] and batch.topology.num_structures == 1


def test_stores_of_molecules_and_of_boxes_in_one_run(box_store, ab_initio_store, dataset):
    # the sample has other levels: it gives graphs, but no labels of this level
    both = Dataset.open([box_store, ab_initio_store], {"reference": "EF", "dz": "EF"})
    data = DataSection(stores=(box_store, ab_initio_store), levels={"reference": "EF", "dz": "EF"})
    forms = {0: set(), 1: set()}
    for batch in itertools.chain.from_iterable(split_batches(both, data, "val", cutoff=5.0, rank=0, size=1)):
        forms[int(batch.source[0, 0])].add(type(batch.topology))
    assert forms == {0: {ListTopology}, 1: {DenseTopology}}


def test_what_a_structure_costs():
    assert [plan.pairs(n, periodic=False) for n in (1, 14, 64, 225)] == [1, 196, 4096, 14400]
    assert [plan.pairs(n, periodic=True) for n in (1, 14, 64, 225)] == [64, 896, 4096, 14400]
    (stream,) = plan.plan(
        [plan.wanted_rows(225, [(0, 40)], 100, periodic=True)], num_streams=1, budget=60_000, blocks_per_batch=2, seed=0
    )
    sizes = [sum(stop - start for _, start, stop in stream.micro_batch(t)) for t in range(len(stream.edges) - 1)]
    assert sum(sizes) == 40 and max(sizes) <= 4


def test_neighbour_lists_of_a_small_cache_are_the_same(box_store, dataset):
    """Found anew in every epoch or kept: the same batches."""
    loaders = [
        TrainLoader(dataset, section(box_store, cache_mb=mb), streams=[0], num_streams=1, seed=0, cutoff=5.0)
        for mb in (0, 100)
    ]
    for epoch in range(2):
        for ours, theirs in zip(*(loader.batches(epoch) for loader in loaders), strict=True):
            for a, b in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
                for name in ("neighbours", "reverse", "valid", "shift", "cells"):
                    assert torch.equal(getattr(a.topology, name), getattr(b.topology, name))
    for loader in loaders:
        loader.close()


def test_half_the_room_spares_half_the_work_of_later_epochs():
    made = []
    cache = Cache(room=50, size=lambda _value: 1)
    generator = np.random.default_rng(0)
    for _epoch in range(3):
        for key in generator.permutation(100).tolist():
            assert cache.get(key, lambda key=key: made.append(key) or str(key)) == str(key)
    assert len(made) == 100 + 50 + 50
