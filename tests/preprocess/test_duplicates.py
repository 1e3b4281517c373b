"""Structures that stand in the sources twice are counted and listed; in two splits they are a leak, which is told."""

import csv
import json

import h5py
import numpy as np
import pytest
import raw_files
import trajectory_files
from ase import Atoms
from boxes import labelled
from in_process import rows, shard, splits

from hpcmlip.data import inspection
from hpcmlip.preprocess import fingerprints
from hpcmlip.preprocess.readers import Rows

ROWS = 40


@pytest.fixture
def config(tmp_path):
    """Two files of which the second repeats 7 conformations of the first, in another order of the atoms."""
    for i in range(2):
        raw_files.write_ani1x(tmp_path / f"raw{i}.h5", rows=ROWS, seed=i)
    with h5py.File(tmp_path / "raw0.h5") as first, h5py.File(tmp_path / "raw1.h5", "a") as second:
        for key in ("coordinates", "wb97x_dz.energy", "wb97x_dz.forces"):
            values = first["C1H4"][key][10:17]
            second["C1H4"][key][20:27] = values if values.ndim == 1 else values[:, [0, 4, 2, 3, 1]]
    split = {"by": "structure", "fractions": [0.4, 0.3, 0.3]}
    return raw_files.write_config(tmp_path, "raw*.h5", "ani1x", levels={"dz": "dz"}, split=split)


def listed(store) -> list[dict[str, str]]:
    with open(store.path / "duplicates.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_duplicates_across_files_are_listed_with_their_splits(config, capsys):
    store = shard(config)
    found = listed(store)
    assert [(line["file"], line["group"], int(line["row"])) for line in found] == [
        ("raw1.h5", "/C1H4", row) for row in range(20, 27)
    ]
    assert [(line["first_file"], int(line["first_row"])) for line in found] == [("raw0.h5", r) for r in range(10, 17)]
    split = splits(store)
    across = 0
    for line in found:
        assert (
            line["split"] == split[1, 1, int(line["row"])]
            and line["first_split"] == split[0, 1, int(line["first_row"])]
        )
        across += line["split"] != line["first_split"]
    assert store.duplicates == {"structures": 7, "across_splits": across} and across
    told = f"7 structures repeat an earlier one, {across} of them in another split than the first of their kind"
    assert told in capsys.readouterr().out.replace("\n", " ")
    inspection.show(store.path)
    assert told in capsys.readouterr().out
    inspection.show(store.path, as_json=True)
    assert json.loads(capsys.readouterr().out)["duplicates"] == store.duplicates


def test_what_is_left_out_is_no_duplicate(config, tmp_path):
    """A bad row that repeats a good one, and rows without labels."""
    with h5py.File(tmp_path / "raw1.h5", "a") as file:
        file["C1H4/wb97x_dz.energy"][20] = np.inf
        file["C1H4/wb97x_dz.energy"][21:24] = np.nan
        file["C1H4/wb97x_dz.forces"][21:24] = np.nan
    store = shard(config, "split.by=formula")
    assert store.duplicates == {"structures": 3, "across_splits": 0} and store.meta.quarantined == 1


def test_a_thousand_of_one_kind(tmp_path):
    """All repeat the first."""
    raw_files.write_ani1x(tmp_path / "raw.h5", rows=1000, molecules={"H2O1": [8, 1, 1]})
    with h5py.File(tmp_path / "raw.h5", "a") as file:
        file["H2O1/coordinates"][:] = file["H2O1/coordinates"][0]
    store = shard(raw_files.write_config(tmp_path, "raw.h5", "ani1x", split={"by": "structure"}), "check_units=false")
    count = store.meta.num_structures
    assert store.duplicates["structures"] == count - 1
    first = min(rows(store, "z"))
    assert {int(line["first_row"]) for line in listed(store)} == {first[2]}


def test_the_same_atoms_in_two_boxes_are_two_structures(tmp_path):
    pos = np.random.default_rng(0).uniform(0, 3, (4, 3))
    boxes = [Atoms("CH3", pos, cell=np.eye(3) * (6 + i // 2), pbc=i > 1) for i in range(8)]
    trajectory_files.write_extxyz(tmp_path / "raw.xyz", labelled(boxes))
    config = raw_files.write_config(tmp_path, "raw.xyz", "extxyz", split={"by": "structure"}, min_distance=0.01)
    store = shard(config, "check_units=false")
    # two without a box, and pairs in three boxes
    assert store.meta.num_structures == 8 and store.duplicates["structures"] == 4


def test_fingerprints_depend_on_every_number_and_no_order():
    rng = np.random.default_rng(0)
    numbers, pos = np.array([6, 1, 1, 8]), rng.standard_normal((1, 4, 3)).astype(np.float32)
    pos[0, 0, 0] = 0

    def of(numbers, pos) -> int:
        R = len(pos)
        return int(fingerprints.of(Rows(numbers, pos, np.zeros((R, 1)), np.zeros((R, 0, 4, 3)), np.full(R, "x")))[0])

    base, order = of(numbers, pos), [3, 1, 0, 2]
    assert of(numbers[order], pos[:, order]) == base
    assert of(numbers, np.where(pos == 0, np.float32(-0.0), pos)) == base
    changed = [pos.copy() for _ in range(12)]
    for i, x in enumerate(changed):
        x.reshape(-1)[i] = np.nextafter(x.reshape(-1)[i], np.float32(9))
    others = {of(numbers, x) for x in changed} | {of(np.array([6, 1, 8, 1]), pos), of(np.array([6, 1, 1, 7]), pos)}
    assert len(others | {base}) == 15
    many = rng.standard_normal((100_000, 1, 3)).astype(np.float32)
    assert len(np.unique(fingerprints.of(Rows(np.array([1]), many, many[:, 0, :1], many[:, :0], many)))) == 100_000
