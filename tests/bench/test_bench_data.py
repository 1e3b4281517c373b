"""The data benchmarks: made-up files are what they say, and what is timed is checked."""

import json
from functools import partial

import h5py
import numpy as np
import pytest

from hpcmlip import plugins
from hpcmlip.bench import ani1, ani1_like, loader, page
from hpcmlip.config import DataSection
from hpcmlip.data.store import open_store

SMALL = {1: (3, 60, 10, 30), 3: (6, 240, 15, 60)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Raw files of a few molecules, where `bench ani1 --folder` takes them from."""
    path = tmp_path_factory.mktemp("ani1")
    (path / "raw1").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ani1_like, "CONTENTS", SMALL)
        for heavy in SMALL:
            ani1_like.write_file(path / "raw1", heavy)
    return path


def test_the_table_is_that_of_the_published_data_set():
    molecules, conformations, *_ = (sum(column) for column in zip(*ani1_like.CONTENTS.values(), strict=True))
    assert (molecules, conformations) == (57_462, 22_057_374)


@pytest.mark.parametrize("heavy", [1, 4, 8])
def test_conformations_add_up_within_their_limits(heavy):
    molecules, total, fewest, most = ani1_like.CONTENTS[heavy]
    counts = ani1_like.conformations(np.random.default_rng(0), molecules, total, fewest, most)
    assert (len(counts), counts.sum(), counts.min(), counts.max()) == (molecules, total, fewest, most)


def test_molecules_are_saturated_and_have_no_close_contacts(folder):
    with h5py.File(folder / "raw1" / "ani_gdb_s03.h5") as file:
        groups = list(file["gdb11_s03"].values())
        assert len({group["smiles"][:].tobytes() for group in groups}) == len(groups) == 6
        assert sum(len(group["energies"]) for group in groups) == 240
        for group in groups:
            assert np.count_nonzero(group["species"][:] != b"H") == 3
            pos = group["coordinates"][0].astype(float)
            distances = np.linalg.norm(pos[:, None] - pos[None], axis=2)
            assert distances[~np.eye(len(pos), dtype=bool)].min() > 0.8


def test_a_file_is_sharded_and_compared(folder, capsys):
    assert ani1.main(["--folder", str(folder), "--workers", "1"]) == 0
    (row,) = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert row["structures"] == 300 and row["peak_mb"] > 50 and set(row["phases"]) >= {"listing", "reading", "writing"}
    store, raw = folder / "ani1.zarr", sorted((folder / "raw1").glob("*.h5"))
    with h5py.File(raw[0], "r+") as file:
        group = next(iter(file["gdb11_s01"].values()))
        group["coordinates"][:] += 0.01
        rows = len(group["coordinates"])
    assert ani1._differences(store, raw) == rows


def test_the_model_goes_through_both_runs():
    sizes = {"structures": 1000, "raw_mb": 10, "store_mb": 5, "files": 7}
    found = ani1._model([sizes | {"workers": 1, "seconds": 100.0}, sizes | {"workers": 2, "seconds": 60.0}])
    assert (found["serial_seconds"], found["shared_seconds"]) == (20.0, 80.0)
    assert [row["seconds"] for row in found["workers"][:3]] == [100.0, 60.0, 40.0]


def test_the_loader_is_timed(ab_initio_store, capsys):
    levels = [f"{level.name}=E" for level in open_store(ab_initio_store).meta.levels[:2]]
    arguments = ["--store", str(ab_initio_store), "--levels", *levels, "--seconds", "0.2", "--repeats", "2"]
    assert loader.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["loader"] for row in rows] == ["hpcmlip, energies", f"hpcmlip, {' '.join(levels)}"]
    assert all(row["structures_per_s"] > 0 for row in rows)


def test_an_order_that_depends_on_ranks_is_seen(ab_initio_store, monkeypatch):
    name = open_store(ab_initio_store).meta.levels[0].name
    monkeypatch.setattr(loader, "DataSection", partial(DataSection, pairs_per_batch=500))  # many steps
    assert loader._order_is_right(ab_initio_store, {name: "E"})
    made = loader._loader

    def depends(store, levels, streams):
        found = made(store, levels, streams)
        found._seed = len(streams)
        return found

    monkeypatch.setattr(loader, "_loader", depends)
    assert not loader._order_is_right(ab_initio_store, {name: "E"})


def test_the_page_shows_what_was_run():
    name, *_ = (section.name for section in page.SECTIONS)
    found = {
        "command": "hpcmlip bench x",
        "output": "a table",
        "date": "2026-01-01",
        "machine": "m",
        "packages": {"torch": "2"},
    }
    text = page.render({name: found})
    assert "`hpcmlip bench x`" in text and "a table" in text and text.count("\n## ") == 1


def test_every_section_is_a_benchmark():
    assert {section.arguments[0] for section in page.SECTIONS} <= set(plugins.names("bench"))
