"""R14, R20: any number of structures for any number of ranks, and the same sequence whatever reads it."""

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmlip.config import DataSection, load
from hpcmlip.data import loader as loading
from hpcmlip.data import plan
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import TrainLoader, split_batches
from hpcmlip.preprocess import pipeline
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.job import make

BATCH = 4
"""Structures of a micro-batch."""
STREAMS = 6
"""Micro-batches a step: what 1, 2 and 3 ranks share."""
LEVELS = {"x": "E"}
Id = tuple[int, ...]


def section(store: Path, **settings) -> DataSection:
    return DataSection(stores=(store,), levels=LEVELS, **settings)


def steps(dataset: Dataset, data: DataSection, *, streams: Sequence[int], num_streams: int, epoch: int) -> list:
    """Per step and stream: ids of its structures with weight, in their order."""
    running = TrainLoader(dataset, data, streams=streams, num_streams=num_streams, seed=0, cutoff=5.0)
    found = [
        [[tuple(i) for block in micro for i in block.source[block.weight.numpy() > 0].tolist()] for micro in step]
        for step in running.batches(epoch)
    ]
    running.close()
    return found


def of_ranks(dataset: Dataset, data: DataSection, ranks: int, num_streams: int, epoch: int) -> list[list]:
    """Steps of each rank."""
    share = num_streams // ranks
    return [
        steps(dataset, data, streams=range(r * share, (r + 1) * share), num_streams=num_streams, epoch=epoch)
        for r in range(ranks)
    ]


# -------------------------------------------------------------------------------------------------------- uneven data


def make_store(folder: Path, structures: int) -> Path:
    """A store of so many structures of three atoms, all to be trained on."""
    rng = np.random.default_rng(structures)
    with h5py.File(folder / "raw.h5", "w") as file:
        group = file.create_group("H2O")
        group["species"] = np.array([8, 1, 1])
        group["coordinates"] = np.eye(3, dtype=np.float32) + 0.1 * rng.standard_normal((structures, 3, 3), np.float32)
        group["energies"] = -76.0 + rng.random(structures)
    values = {"name": "t", "reader": "ani1", "sources": ["raw.h5"], "out": "out.zarr"}
    values |= {"levels": {"x": {"energy": "energies"}}, "split": {"by": "structure", "fractions": [1, 0, 0]}}
    (folder / "data.yaml").write_text(str(values))
    job = make(load(DataConfig, folder / "data.yaml"))
    pipeline.build(job, lambda function, tasks, done: [done(task, function(task)) for task in tasks])
    return job.config.out


def uneven(store: Path, structures: int) -> list[str]:
    """What is wrong with an epoch, for 1 to 3 ranks and one or two micro-batches a rank."""
    dataset, data = Dataset.open([store], LEVELS), section(store, pairs_per_batch=9 * BATCH, blocks_per_batch=2)
    wrong = []
    for ranks, each in ((r, e) for r in (1, 2, 3) for e in (1, 2)):
        for epoch in range(2):
            where = f"{structures} structures, {ranks} ranks, {each} micro-batches a rank, epoch {epoch}"
            parts = of_ranks(dataset, data, ranks, ranks * each, epoch)
            if len({len(part) for part in parts}) != 1:
                wrong.append(f"{where}: steps {[len(part) for part in parts]}")
            ids = [i for part in parts for step in part for micro in step for i in micro]
            if not len(ids) == len(set(ids)) == structures:
                wrong.append(f"{where}: {len(ids)} ids, {len(set(ids))} different")
        held = [split_batches(dataset, data, "train", cutoff=5.0, rank=r, size=ranks) for r in range(ranks)]
        ids = [tuple(i) for part in held for micro in part for block in micro for i in block.source.tolist()]
        if not len(ids) == len(set(ids)) == structures:
            wrong.append(f"{structures} structures validated on {ranks} ranks: {len(ids)} ids")
    return wrong


MOST = 2 * 3 * BATCH + 1


@pytest.mark.timeout(60)
@pytest.mark.fault("R14", sample=3, soak=MOST)
def test_any_number_of_structures(tmp_path, draw):
    structures = draw.number + 1 if draw.is_soak else draw.rng.randint(1, MOST)
    print(f"{structures} structures")
    assert not uneven(make_store(tmp_path, structures), structures)


@pytest.mark.control("R14", broken="each stream has as many steps as it needs")
def test_ranks_with_unequal_steps_are_seen(tmp_path, monkeypatch):
    cut = plan._edges
    monkeypatch.setattr(plan, "_edges", lambda taken_in, steps: cut(taken_in, taken_in.max(initial=0) + 1))
    monkeypatch.setattr(TrainLoader, "steps", lambda self, epoch: len(self._plan(epoch)[self._streams[0]].edges) - 1)
    monkeypatch.setattr(TrainLoader, "_produce", _own_steps)
    assert any("steps" in text for text in uneven(make_store(tmp_path, 9), 9))


def _own_steps(self, epoch: int, first_step: int):
    streams = self._plan(epoch)
    visits = [plan.order(g.rows, group=i, seed=self._seed, epoch=epoch) for i, g in enumerate(self._groups)]
    for step in range(first_step, self.steps(epoch)):
        yield [
            self._micro_batch(streams[s], s, visits, step) for s in self._streams if step < len(streams[s].edges) - 1
        ]


# --------------------------------------------------------------------------------------------------------- the order


def sequence(store: Path, ranks: int, *, cache_mb: float, epoch: int) -> list[Id]:
    """Ids of an epoch as the steps take them, stream after stream: not sorted."""
    dataset = Dataset.open([store], {"dz": "EF", "cc": "E"})
    data = DataSection(stores=(store,), levels={"dz": "EF", "cc": "E"}, pairs_per_batch=1250, cache_mb=cache_mb)
    parts = of_ranks(dataset, data, ranks, STREAMS, epoch)
    return [i for step in range(len(parts[0])) for part in parts for micro in part[step] for i in micro]


def sequences(store: Path, epoch: int, readers: Sequence[tuple[int, float, int]], monkeypatch) -> list[list[Id]]:
    """Of each of (ranks, MB of cache, steps kept ready)."""
    found = []
    for ranks, cache_mb, ahead in readers:
        monkeypatch.setattr(loading, "PREFETCH", ahead)
        found.append(sequence(store, ranks, cache_mb=cache_mb, epoch=epoch))
    return found


READERS = ((1, 1024, 4), (1, 0.01, 1), (2, 1024, 1), (2, 0.01, 4), (3, 0.01, 1))


@pytest.mark.fault("R20", sample=1, soak=10)
def test_the_sequence_does_not_depend_on_who_reads_it(ab_initio_store, monkeypatch, draw):
    first, *others = sequences(ab_initio_store, draw.rng.randrange(1000), READERS, monkeypatch)
    assert all(ids == first for ids in others)
    assert len(first) == len(set(first)) == 781 and first != sorted(first)


@pytest.mark.control("R20", broken="the order within a window comes from a generator of the process")
def test_an_order_that_depends_on_the_process_is_seen(ab_initio_store, monkeypatch):
    own = np.random.default_rng(0)
    monkeypatch.setattr(
        plan.Order,
        "permutation",
        lambda self, window: own.permutation(int(self.edges[window + 1] - self.edges[window])),
    )
    one, two = sequences(ab_initio_store, 0, [READERS[0], READERS[2]], monkeypatch)
    assert one != two
