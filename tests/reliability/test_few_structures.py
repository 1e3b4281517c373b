"""R14: any number of structures on any number of ranks is trained on: no hang, each structure once an epoch."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpcmlip.config import load
from hpcmlip.data.splits import of_rows
from hpcmlip.data.store import Store, open_store
from hpcmlip.preprocess import pipeline
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.job import make

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

WORKER = Path(__file__).with_name("few_structures_worker.py")
LEVEL = {"energy": "wb97x_dz.energy", "forces": "wb97x_dz.forces"}
FORMULAS = ("C1H3N1", "C1H4O1")
"""Two sizes of molecules, so that blocks are uneven too."""
PAIRS = 100
"""A micro-batch of at most four of these molecules (5 and 6 atoms)."""
BATCH = 4


def shard(folder: Path, source: Path, num_train: int) -> Path:
    """A store of `num_train` structures to train on and at least one to validate, by the shipped sharding."""
    folder.mkdir()
    rows = [num_train // 2 + 1, (num_train + 1) // 2 + 1]
    with h5py.File(source) as whole, h5py.File(folder / "raw.h5", "w") as raw:
        for name, count in zip(FORMULAS, rows, strict=True):
            group = raw.create_group(name)
            group["atomic_numbers"] = whole[name]["atomic_numbers"][:]
            for key in ("coordinates", *LEVEL.values()):
                group[key] = whole[name][key][:count]
    fractions = (num_train / sum(rows), 1 - num_train / sum(rows), 0.0)
    seed = next(seed for seed in range(10**4) if train_rows(rows, fractions, seed) == num_train)
    values = {"name": "few", "reader": "ani1x", "sources": ["raw.h5"], "out": "few.zarr", "levels": {"dft": LEVEL}}
    values["split"] = {"by": "structure", "fractions": fractions, "seed": seed}
    (folder / "data.yaml").write_text(json.dumps(values))

    def execute(function, tasks, done) -> None:
        for task in tasks:
            done(task, function(task))

    job = make(load(DataConfig, folder / "data.yaml"))
    pipeline.build(job, execute)
    return job.config.out


def train_rows(rows: list[int], fractions: tuple, seed: int) -> int:
    """Structures that fall into the training split."""
    return sum(
        int((of_rows(f"/{name}", np.arange(count), fractions, seed) == 0).sum())
        for name, count in zip(FORMULAS, rows, strict=True)
    )


def trained(store: Store) -> list[list[int]]:
    """Sources [store, file, group, row] of the structures of the training split."""
    found = [
        [0, *source]
        for group in store.meta.groups
        for segment in group.segments
        if segment.split == "train"
        for source in store.read(group, "source", segment.start, segment.stop).tolist()
    ]
    return sorted(found)


@pytest.fixture
def run_on(launch, run_values, tmp_path):
    """`run_on(ranks, stores, ...)` trains on each store."""

    def run(ranks: int, stores: list[Path], *, fault: str = "", timeout_minutes: float = 2.0, expect: int | None = 0):
        data = {"levels": {"dft": "EF"}, "pairs_per_batch": PAIRS, "blocks_per_batch": 2}
        engine = run_values["engine"] | {"timeout_minutes": timeout_minutes}
        (tmp_path / "config.json").write_text(json.dumps(run_values | {"data": data, "engine": engine}))
        return launch(WORKER, tmp_path / "config.json", tmp_path, fault, *stores, ranks=ranks, expect=expect)

    return run


@pytest.mark.fault("R14", sample=1, soak=8)
def test_any_number_of_structures_on_any_number_of_ranks(run_on, samples, tmp_path, draw, record_property):
    ranks = draw.rng.choice([2, 3])
    numbers = [1, *sorted(draw.rng.sample(range(2, 2 * ranks * BATCH + 2), 7 if draw.is_soak else 3))]
    print(f"{ranks} ranks, {numbers} structures")
    record_property("ranks, structures", f"{ranks}, {numbers}")
    stores = [shard(tmp_path / f"n{number}", samples["ab_initio"], number) for number in numbers]
    run_on(ranks, stores)
    for i, (number, store) in enumerate(zip(numbers, stores, strict=True)):
        expected = trained(open_store(store))
        assert len(expected) == number
        assert json.loads((tmp_path / f"{i}.json").read_text()) == [expected, expected]
        assert (tmp_path / f"{i}" / "model.safetensors").exists()


@pytest.mark.control("R14", broken="a rank without structures of its own leaves the step out")
def test_ranks_that_count_their_own_steps_do_not_end(run_on, samples, tmp_path):
    store = shard(tmp_path / "n1", samples["ab_initio"], 1)
    ended = run_on(2, [store], fault="unpadded", timeout_minutes=0.15, expect=None)
    assert ended.returncode != 0 and not (tmp_path / "0.json").exists()
