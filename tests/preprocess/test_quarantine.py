"""Bad conformations are left out and listed, or end the run; nothing is repaired in silence."""

import csv

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


def _same_place(x):
    x[2] = x[1]
    return x


def _one_nan(x):
    x[0, 1] = np.nan
    return x


CASES = {
    "nan position": ("coordinates", _one_nan, "position not finite"),
    "infinite position": ("coordinates", lambda x: x * np.inf, "position not finite"),
    "atoms on one place": ("coordinates", _same_place, "atoms too close"),
    "infinite energy": ("wb97x_tz.energy", lambda x: np.inf, "tz energy infinite"),
    "infinite force": ("wb97x_dz.forces", lambda x: x * 0 - np.inf, "dz forces infinite"),
    "partly NaN force": ("wb97x_dz.forces", _one_nan, "dz forces partly NaN"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_row_is_listed_and_left_out(case, raw):
    path, config = raw
    key, change, reason = CASES[case]
    with h5py.File(path) as file:
        value = file[f"C1H4/{key}"][400]
    spoil(path, "C1H4", 400, key, change(value))
    store = shard(config)
    with open(store.path / "quarantine.csv", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [(e["file"], e["group"], e["row"], e["reason"]) for e in listed] == [("raw.h5", "/C1H4", "400", reason)]
    assert store.meta.quarantined == 1
    kept = rows(store, "z").keys()
    assert len(kept) == 4 * ROWS - 1 and (0, 1, 400) not in kept
    assert "quarantine.csv" in store.files


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


def test_gradients_are_not_taken_for_forces(tmp_path):
    """COMP6's sign in a file that is read as if it stored forces."""
    raw_files.write_comp6(tmp_path / "raw.h5", rows=60)
    levels = {"dz": {"energy": "energies", "forces": "forces"}}
    with h5py.File(tmp_path / "raw.h5", "a") as file:
        for group in file["s66x8"].values():
            group["atomic_numbers"] = group["species"]
    config = raw_files.write_config(tmp_path, "raw.h5", "ani1x", levels=levels, split={"by": "structure"})
    with pytest.raises(DataError, match="level 'dz' point uphill"):
        shard(config)


@pytest.mark.parametrize("factor", [27.2114, 627.5])
def test_energies_in_another_unit_are_noticed(factor, tmp_path):
    path = raw_files.write_comp6(tmp_path / "raw.h5", rows=60)
    with h5py.File(path, "a") as file:
        for group in file["s66x8"].values():
            group["energies"][:] = group["energies"][()] * factor
    config = raw_files.write_config(tmp_path, "raw.h5", "comp6", split={"by": "structure"})
    with pytest.raises(DataError, match="eV an atom away from the isolated atoms"):
        shard(config)


@pytest.mark.parametrize("factor", [0.1, 1.8897])
def test_coordinates_in_another_unit(factor, tmp_path, caplog):
    """nm: all atoms too close. Bohr: forces and energies no longer fit together."""
    path = raw_files.write_comp6(tmp_path / "raw.h5", rows=60)
    with h5py.File(path, "a") as file:
        for group in file["s66x8"].values():
            group["coordinates"][:] = group["coordinates"][()] * factor
    config = raw_files.write_config(tmp_path, "raw.h5", "comp6", split={"by": "structure"})
    if factor < 1:
        with pytest.raises(DataError, match="atoms too close"):
            shard(config)
    else:
        shard(config)
        assert "check the units" in caplog.text
