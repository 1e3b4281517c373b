"""R9, of stores: a flipped bit anywhere is found by `verify`, and reading gives the same data or an error."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from zarr.codecs import ZstdCodec

from hpcmlip import configs
from hpcmlip.config import load
from hpcmlip.data import verification
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.store import MANIFEST, open_store, read_manifest
from hpcmlip.errors import DataError
from hpcmlip.preprocess import arrays, pipeline
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.files import entry
from hpcmlip.preprocess.job import make

FLIPS = 30
"""A draw."""


@pytest.fixture(scope="module")
def store(ab_initio_store, tmp_path_factory) -> Path:
    """A copy; every flip is taken back."""
    return Path(shutil.copytree(ab_initio_store, tmp_path_factory.mktemp("flips") / "copy.zarr"))


def everything(store: Path) -> dict[str, object]:
    """All that a reader can know of a store: metadata and every row of every array."""
    opened = open_store(store)
    found = {"meta": json.dumps(opened.meta.as_json()), "digest": opened.digest, "duplicates": opened.duplicates}
    for group in opened.meta.groups:
        for name in sorted(opened.root[group.path].array_keys()):
            found[f"{group.path}/{name}"] = opened.read(group, name, 0, group.rows).tobytes()
    Dataset.open([store], {"dz": "EF", "cc": "E"})
    return found


def flip(path: Path, rng) -> Callable[[], None]:
    """Flip a random bit of a file; returns what takes it back."""
    whole = path.read_bytes()
    data = bytearray(whole)
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return lambda: path.write_bytes(whole)


def silent(store: Path, name: str, expected: dict[str, object]) -> list[str]:
    """Who takes a store with a damaged file `name` for a sound one."""
    try:
        found = list(verification.check_files(store))
        missed = [] if any(text.startswith(f"{name}: ") for text in found) else ["verify"]
    except DataError as error:
        missed = [] if name in str(error) else ["verify"]
    try:
        if everything(store) != expected:
            missed.append("reading")
    except DataError:
        pass
    return missed


def random_file(store: Path, rng) -> str:
    """Half of them shards; the others metadata, manifest, molecules and reports."""
    files = sorted(path.relative_to(store).as_posix() for path in store.rglob("*") if path.is_file())
    shards = [name for name in files if "/c/" in name]
    top = [name for name in files if "/" not in name]
    return rng.choice(rng.choice([shards, shards, top, [name for name in files if name not in {*shards, *top}]]))


@pytest.mark.fault("R9", sample=1, soak=10)
def test_every_flipped_bit_of_a_store_is_found(store, draw):
    expected = everything(store)
    for i in range(FLIPS):
        name = random_file(store, draw.rng)
        take_back = flip(store / name, draw.rng)
        try:
            assert not silent(store, name, expected), f"flip {i} in {name}"
        finally:
            take_back()
    assert not list(verification.check_files(store)) and everything(store) == expected


@pytest.mark.fault("R9", sample=1, soak=3)
def test_every_flipped_bit_of_a_shard_is_refused_without_the_manifest(store, draw):
    """The checksum of each chunk alone."""
    opened = open_store(store)
    names = [(g, name) for g in opened.meta.groups for name in ("z", "pos", "energy", "forces", "molecule", "source")]
    for _ in range(100):
        group, name = draw.rng.choice(names)
        path = next(p for p in sorted((store / group.path / name / "c").rglob("*")) if p.is_file())
        take_back = flip(path, draw.rng)
        try:
            with pytest.raises(DataError, match=f"{group.path}/{name} are damaged"):
                opened.read(group, name, 0, group.rows)
        finally:
            take_back()


@pytest.mark.fault("R9", sample=1, soak=3)
@pytest.mark.parametrize("name", ["zarr.json", MANIFEST])
def test_no_flipped_bit_of_the_metadata_opens_a_store(name, store, draw):
    for _ in range(100):
        take_back = flip(store / name, draw.rng)
        try:
            with pytest.raises(
                DataError, match=name if name == MANIFEST else "no hpcmlip store|does not match|upgrade"
            ):
                open_store(store)
        finally:
            take_back()


@pytest.mark.control("R9", broken="chunks without crc32c, no manifest")
def test_without_checksums_wrong_numbers_are_seen(tmp_path, draw, monkeypatch):
    """A store as zarr's own defaults would have it: flips come back as numbers."""
    for codec in ("BloscCodec", "Crc32cCodec"):
        monkeypatch.setattr(arrays, codec, lambda **_: ZstdCodec(level=0, checksum=False))
    config = load(DataConfig, configs.path("data/ab_initio_small.yaml"), [f"out={tmp_path / 'plain.zarr'}"])
    pipeline.build(make(config), lambda function, tasks, done: [done(task, function(task)) for task in tasks])
    store, wrong = tmp_path / "plain.zarr", 0
    expected, shards = everything(store), sorted(name for name in open_store(store).files if "/c/" in name)
    for _ in range(FLIPS):
        name = draw.rng.choice(shards)
        take_back = flip(store / name, draw.rng)
        wrong += "reading" in silent(store, name, expected)
        take_back()
    assert wrong > FLIPS / 10


@pytest.mark.control("R9", broken="metadata is not compared with the manifest")
def test_metadata_that_nobody_compares_are_seen(store, monkeypatch):
    expected, path, manifest = everything(store), store / "zarr.json", read_manifest(store)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"cutoff": 6.5', b'"cutoff": 6.4'))
    manifest["files"]["zarr.json"] = entry(path)
    monkeypatch.setattr("hpcmlip.data.store.read_manifest", lambda path: manifest)
    monkeypatch.setattr(verification, "read_manifest", lambda path: manifest)
    try:
        assert silent(store, "zarr.json", expected) == ["verify", "reading"]
    finally:
        path.write_bytes(whole)
