"""R8: a shard that is cut, empty or gone is named by `verify`, and training on it stops with a sentence."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from hpcmlip.config import RunConfig, load
from hpcmlip.data import verification
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import TrainLoader, split_batches
from hpcmlip.data.store import Store, open_store
from hpcmlip.errors import DataError

READ = ("z", "pos", "energy", "forces", "source")
"""Arrays that training reads."""


@pytest.fixture
def store(ab_initio_store, tmp_path) -> Path:
    return Path(shutil.copytree(ab_initio_store, tmp_path / "copy.zarr"))


def damage(store: Path, rng, arrays: tuple[str, ...] | None = None) -> str:
    """Cut or delete a shard of these arrays (None: any); its name."""
    names = [n for n in open_store(store).files if "/c/" in n and (arrays is None or n.split("/")[1] in arrays)]
    name = rng.choice(sorted(names))
    size = (store / name).stat().st_size
    left = rng.choice([0, 1, size // 2, size - 1, None])
    if left is None:
        (store / name).unlink()
    else:
        with (store / name).open("r+b") as file:
            file.truncate(left)
    print(f"{name}: {'deleted' if left is None else f'{left} of {size} bytes left'}")
    return name


def silent(config: Path, name: str) -> list[str]:
    """Who did not notice that the shard `name` is damaged: `verify`, or the loaders of a run."""
    run = load(RunConfig, config)
    (store,) = run.data.stores
    missed = [] if any(text.startswith(f"{name}: ") for text in verification.check_files(store)) else ["verify"]
    try:
        read_all(run)
    except DataError as error:
        return missed if name in str(error) else [*missed, f"training, which says: {error}"]
    return [*missed, "training"]


def read_all(run: RunConfig) -> None:
    """What an epoch and its validation read."""
    dataset = Dataset.open(run.data.stores, run.data.levels)
    loader = TrainLoader(dataset, run.data, streams=range(2), num_streams=2, seed=0, cutoff=6.5)
    try:
        for _ in loader.batches(0):
            pass
    finally:
        loader.close()
    for _ in split_batches(dataset, run.data, "val", cutoff=6.5, rank=0, size=1):
        pass


@pytest.mark.fault("R8", sample=10, soak=50)
def test_a_lost_shard_is_named(store, write_run, tmp_path, draw):
    config = write_run(tmp_path, store=store)
    assert not silent(config, damage(store, draw.rng, READ))


@pytest.mark.fault("R8", sample=1, soak=10)
def test_a_run_does_not_train_on_a_lost_shard(store, write_run, cli, tmp_path, draw):
    """The real commands: exit code 1, one sentence, no finished run."""
    config = write_run(tmp_path, store=store)
    name = damage(store, draw.rng, READ)
    trained = cli("train", config, "--run-dir", tmp_path / "run", expect=1)
    told = [line for line in trained.stderr.splitlines() if line.startswith("hpcmlip: ")]
    assert len(told) == 1 and name in told[0] and "shard again" in told[0], trained.output
    assert "Traceback" not in trained.output
    assert not (tmp_path / "run" / "model.safetensors").exists()
    verified = cli("verify", store, expect=1)
    assert f"{name}: " in verified.stdout and "shard it again" in verified.stdout


def test_shards_that_training_does_not_read_are_named_by_verify(store, cli, tmp_path, draw):
    name = damage(store, draw.rng, ("molecule", "adjacency"))
    assert f"{name}: " in cli("verify", store, expect=1).stdout


@pytest.mark.control("R8", broken="shards are read without a look at the manifest")
def test_fill_values_in_place_of_a_shard_are_seen(store, write_run, tmp_path, draw, monkeypatch):
    """What zarr does by itself with a shard that is gone: the check must notice."""
    config = write_run(tmp_path, store=store)
    opened = open_store(store)
    group = opened.meta.groups[0]
    name = next(n for n in sorted(opened.files) if n.startswith(f"{group.path}/energy/c/"))
    (store / name).unlink()
    monkeypatch.setattr(Store, "_check_present", lambda self, name: None)
    assert not np.any(opened.read(group, "energy", 0, group.rows_per_shard)), "zarr should give fill values"
    assert silent(config, name) == ["training"]
