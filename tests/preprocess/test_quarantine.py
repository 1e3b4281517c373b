"""Bad conformations are left out and listed, or end the run; nothing is repaired in silence."""

import h5py
import numpy as np
import pytest
import raw_files
from in_process import rows, shard

from hpcmlip.errors import DataError

ROWS = 500


def spoil(path, group: str, row: int, key: str, value) -> None:
    with h5py.File(path, "a") as file:
        file[f"{group}/{key}"][row] = value


def positions(path, group: str, row: int) -> np.ndarray:
    with h5py.File(path) as file:
        return file[f"{group}/coordinates"][row]


@pytest.fixture
def raw(tmp_path):
    path = raw_files.write_ani1x(tmp_path / "raw.h5", rows=ROWS)
    return path, raw_files.write_config(tmp_path, "raw.h5", "ani1x", split={"by": "structure"})


def test_every_atom_distance_counts(raw):
    """`min_distance` is the only measure: a distance just above it is kept."""
    path, config = raw
    for row, distance in ((3, 0.39), (4, 0.41)):
        x = positions(path, "H2O1", row)
        x[2] = x[0] + np.float32([distance, 0, 0])
        spoil(path, "H2O1", row, "coordinates", x)
    store = shard(config)
    assert {(0, 3, 3), (0, 3, 4)} - rows(store, "z").keys() == {(0, 3, 3)}


def test_an_unknown_element_is_bad(tmp_path):
    molecules = raw_files.MOLECULES | {"H1Cl1": [17, 1]}
    path = raw_files.write_ani1x(tmp_path / "raw.h5", rows=ROWS, molecules=molecules)
    with h5py.File(path, "a") as file:
        for key in list(file["H1Cl1"]):
            values = file["H1Cl1"][key][()]
            if key != "atomic_numbers":
                del file["H1Cl1"][key]
                file["H1Cl1"][key] = values[:3]
    config = raw_files.write_config(tmp_path, "raw.h5", "ani1x", split={"by": "structure"})
    store = shard(config)
    assert store.meta.quarantined == 3 and store.meta.num_structures == 4 * ROWS
    text = (store.path / "quarantine.csv").read_text()
    assert text.count("/H1Cl1") == text.count("unknown element,Cl") == 3
    extended = shard(config, "elements=[H, C, N, O, Cl]", f"out={tmp_path / 'more.zarr'}")
    assert extended.meta.quarantined == 0 and 17 in extended.meta.elements


def test_more_than_one_percent_ends_the_run(raw):
    """20 of 2000 are let pass, 21 are not."""
    path, config = raw
    for row in range(20):
        spoil(path, "C1H3N1", row, "wb97x_dz.energy", np.inf)
    assert shard(config).meta.quarantined == 20
    spoil(path, "C1H3N1", 20, "wb97x_dz.energy", np.inf)
    with pytest.raises(DataError, match=r"21 of 2,000 .*more than 1 %.*raw\.h5 /C1H3N1 row 0: dz energy infinite"):
        shard(config, f"out={path.parent / 'other.zarr'}")
    assert not (path.parent / "other.zarr").exists()


def test_on_bad_fail_takes_none(raw):
    path, config = raw
    spoil(path, "C2H4O1", 7, "coordinates", np.nan)
    with pytest.raises(DataError, match=r"1 of 2,000 .*on_bad is 'fail'.*/C2H4O1 row 7: position not finite"):
        shard(config, "on_bad=fail")


def test_missing_labels_are_not_bad(tmp_path):
    """NaN means not computed: a level without a single label is a level without labels."""
    path = raw_files.write_ani1x(tmp_path / "raw.h5", rows=40)
    with h5py.File(path, "a") as file:
        for group in file.values():
            group["ccsd(t)_cbs.energy"][:] = np.nan
    store = shard(raw_files.write_config(tmp_path, "raw.h5", "ani1x", split={"by": "structure"}))
    assert store.meta.quarantined == 0 and store.meta.offsets[3].count == 0


def test_the_value_says_where(raw):
    """What a user looks up in the raw file."""
    path, config = raw
    x = positions(path, "C1H4", 3)
    x[2, 1] = np.inf
    spoil(path, "C1H4", 3, "coordinates", x)
    spoil(path, "C1H4", 5, "wb97x_dz.forces", np.full((5, 3), np.nan) * [1, 1, 1] + np.eye(5, 3))
    spoil(path, "H2O1", 8, "wb97x_tz.energy", -np.inf)
    text = (shard(config).path / "quarantine.csv").read_text().splitlines()
    assert text == [
        "file,group,row,reason,value",
        "raw.h5,/C1H4,3,position not finite,inf in y of atom 2",
        "raw.h5,/H2O1,8,tz energy infinite,-inf",
    ]
