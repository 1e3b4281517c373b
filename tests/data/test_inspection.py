"""`inspect` tells the truth about a store; `verify`, and every read, find whatever is done to its files."""

import dataclasses
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from hpcmlip.data import inspection, verification
from hpcmlip.data.store import MANIFEST, SPLITS, molecules_of_splits, open_store
from hpcmlip.errors import DataError


@pytest.fixture
def copy(ab_initio_store, tmp_path) -> Path:
    return Path(shutil.copytree(ab_initio_store, tmp_path / "copy.zarr"))


def test_inspect_as_json(xtb_store, capsys):
    inspection.show(xtb_store, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    store = open_store(xtb_store)
    counts, labels = Counter(), Counter()
    for group in store.meta.groups:
        energy = store.read(group, "energy", 0, group.rows)
        forces = store.read(group, "forces", 0, group.rows)
        for segment in group.segments:
            here = slice(segment.start, segment.stop)
            counts[segment.split] += segment.stop - segment.start
            labels["energy", segment.split] += int(np.isfinite(energy[here, 1]).sum())
            labels["forces", segment.split] += int(np.isfinite(forces[here, 1]).all(axis=(1, 2)).sum())
    assert facts["structures"] == 3720 == sum(counts.values())
    assert facts["split"]["structures"] == dict(counts)
    assert facts["split"]["molecules_in_two_splits"] == 0
    assert sum(facts["split"]["molecules"].values()) == facts["molecules"]
    for prop in ("energy", "forces"):
        assert facts["levels"]["gfn2"]["labels"][prop] == {split: labels[prop, split] for split in SPLITS}
    assert facts["bytes"] == sum(p.stat().st_size for p in xtb_store.rglob("*") if p.is_file() and p.name != MANIFEST)
    assert facts["sources"][0]["name"] == "xtb_tiny.h5" and facts["digest"] == store.digest
    assert facts["levels"]["gfn1"]["fitted_atomic_energies_ev"]["H"] == pytest.approx(-14.8, abs=1)


def test_inspect_as_tables(ab_initio_store, capsys):
    inspection.show(ab_initio_store)
    text = capsys.readouterr().out
    for part in ("998", "dz", "cc", "forces", "ab_initio_small.h5", "sha256", "molecules stand in more than one split"):
        assert part in text
    assert "too few compositions" not in text


def test_a_leak_would_be_seen(xtb_store):
    """The check counts from the rows: call part of the training rows test rows, and molecules stand in both."""
    store = open_store(xtb_store)
    assert (molecules_of_splits(store).sum(axis=1) == 1).all()
    group = store.meta.groups[0]
    segment = group.segments[0]
    middle = (segment.start + segment.stop) // 2 + 1
    parts = (dataclasses.replace(segment, stop=middle), dataclasses.replace(segment, start=middle, split="test"))
    changed = dataclasses.replace(group, segments=(*parts, *group.segments[1:]))
    meta = dataclasses.replace(store.meta, groups=(changed, *store.meta.groups[1:]))
    assert (molecules_of_splits(dataclasses.replace(store, meta=meta)).sum(axis=1) > 1).any()


def test_a_whole_store_verifies(ab_initio_store, cli):
    finished = cli("verify", ab_initio_store)
    assert "998 structures" in finished.stdout


def test_damage_is_named_to_the_end(copy, cli):
    """Two damaged chunks, a lost file and a stray one: all four in one report."""
    for name in ("n005/pos/c/0/0/0", "n009/forces/c/0/0/0/0"):
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 3] ^= 1
        (copy / name).write_bytes(data)
    (copy / "n007/z/c/0/0").unlink()
    (copy / "n006/pos/c/1").write_text("stray")
    finished = cli("verify", copy, expect=1)
    for part in (
        "n005/pos/c/0/0/0: content differs",
        "n005/pos: chunk of rows 0 to",
        "n009/forces: chunk of rows 0 to",
        "n007/z/c/0/0: missing",
        "n006/pos/c/1: not part of the store",
    ):
        assert part in finished.stdout
    assert "Traceback" not in finished.output


def test_every_fault_in_any_file_is_found(copy):
    """Flips, truncations and deletions of any file but the manifest: `verify` names the file."""
    rng, files = random.Random(2), sorted(open_store(copy).files)
    for i in range(60):
        name = rng.choice(files)
        path, whole = copy / name, (copy / name).read_bytes()
        if i % 3 == 0 and whole:
            data = bytearray(whole)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            path.write_bytes(data)
        elif i % 3 == 1:
            path.write_bytes(whole[: rng.choice([0, 1, len(whole) // 2, len(whole) - 1])])
        else:
            path.unlink()
        found = list(verification.check_files(copy))
        assert len(found) == 1 and found[0].startswith(f"{name}: "), (name, found)
        path.write_bytes(whole)
    assert not list(verification.check_files(copy))


@pytest.mark.parametrize("size", [0, 1, -1])
def test_a_short_or_absent_shard_is_refused_by_read(size, copy):
    """zarr itself returns fill values for these."""
    store = open_store(copy)
    group = store.meta.groups[2]
    path = copy / group.path / "energy/c/0/0"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DataError, match="bytes long"):
        store.read(group, "energy", 0, 1)
    path.unlink()
    with pytest.raises(DataError, match="is missing"):
        store.read(group, "energy", 0, 1)


def test_wrong_graphs_and_labels_are_found(ab_initio_store):
    """`verify` recomputes: another cutoff in the metadata gives other graphs, another mask other labels."""
    store = open_store(ab_initio_store)
    group = store.meta.groups[-1]

    def problems(meta):
        changed = dataclasses.replace(store, meta=meta)
        return verification._check_rows(changed, meta.groups[-1], 0, min(group.rows, group.rows_per_chunk))

    assert not problems(store.meta)
    assert any("adjacency" in p for p in problems(dataclasses.replace(store.meta, cutoff=2.0)))
    segments = tuple(dataclasses.replace(s, labels=s.labels ^ 2) for s in group.segments)
    wrong = dataclasses.replace(group, segments=segments)
    meta = dataclasses.replace(store.meta, groups=(*store.meta.groups[:-1], wrong))
    assert any("carries other labels" in p for p in problems(meta))


def test_no_store(tmp_path, cli):
    for command in ("inspect", "verify"):
        finished = cli(command, tmp_path / "absent.zarr", expect=1)
        assert "there is no store at" in finished.stderr and "Traceback" not in finished.output
    (tmp_path / "empty.zarr").mkdir()
    assert "has no readable manifest.json" in cli("verify", tmp_path / "empty.zarr", expect=1).output
