"""Each layout, key and preset: what a reader returns is what the file holds, in eV and Å and with true forces."""

import math

import h5py
import numpy as np
import pytest
import raw_files

from hpcmlip import plugins
from hpcmlip.errors import DataError
from hpcmlip.preprocess.config import LevelSource
from hpcmlip.preprocess.readers import RawLevel
from hpcmlip.units import HARTREE

READERS = ("ani1", "ani1x", "comp6")
WRITERS = {"ani1": raw_files.write_ani1, "ani1x": raw_files.write_ani1x, "comp6": raw_files.write_comp6}


def opened(reader: str, path, levels: dict[str, LevelSource] | None = None, **options):
    module = plugins.find("preprocess.readers", reader)
    chosen = levels if levels is not None else module.PRESETS
    return module.open_file(path, tuple(RawLevel(*item) for item in chosen.items()), options)


def read_all(file):
    return {group.path: (group, file.read(group, 0, group.rows)) for group in file.groups()}


def test_the_readers_are_found():
    assert set(READERS) <= set(plugins.names("preprocess.readers"))


@pytest.mark.parametrize("reader", READERS)
def test_positions_labels_and_forces(reader, tmp_path):
    """Against the analytic potential, evaluated anew at the positions that the reader returned."""
    levels = {"dz": plugins.find("preprocess.readers", reader).PRESETS["dz"]}
    with opened(reader, WRITERS[reader](tmp_path / "raw.h5"), levels) as file:
        for group, rows in read_all(file).values():
            energy, forces = raw_files.morse(rows.numbers, rows.pos)
            assert rows.pos.shape == (group.rows, group.num_atoms, 3) and rows.pos.dtype == np.float32
            label = np.isfinite(rows.energy[:, 0])
            assert label.sum() > 10
            assert np.abs(rows.energy[label, 0] - energy[label] * HARTREE).max() < 1e-9
            if rows.forces.shape[1]:
                label = np.isfinite(rows.forces[:, 0]).all(axis=(1, 2))
                assert np.abs(rows.forces[label, 0] - forces[label] * HARTREE).max() < 1e-5
    assert (reader == "ani1") == (rows.forces.shape[1] == 0)


@pytest.mark.parametrize("reader", READERS)
def test_a_range_of_rows_equals_the_whole(reader, tmp_path):
    options = {"high_energy": True} if reader == "ani1" else {}
    with opened(reader, WRITERS[reader](tmp_path / "raw.h5"), **options) as file:
        for group, whole in read_all(file).values():
            for start, stop in ((0, 1), (3, 17), (18, group.rows), (0, group.rows)):
                part = file.read(group, start, stop)
                for name in ("pos", "energy", "forces", "molecule"):
                    assert np.array_equal(
                        getattr(part, name).astype(str), getattr(whole, name)[start:stop].astype(str)
                    ), (name, start, stop)


@pytest.mark.parametrize("reader", READERS)
def test_groups_come_sorted_by_path(reader, tmp_path):
    with opened(reader, WRITERS[reader](tmp_path / "raw.h5")) as file:
        groups = file.groups()
    assert [g.path for g in groups] == sorted(g.path for g in groups)
    assert [g.ordinal for g in groups] == list(range(len(groups)))


def test_ani1_high_energy_conformations_follow_the_others(tmp_path):
    path = raw_files.write_ani1(tmp_path / "raw.h5", rows=20, high=5)
    with opened("ani1", path) as file:
        assert [group.rows for group in file.groups()] == [20, 20, 20, 20]
    with opened("ani1", path, high_energy=True) as file, h5py.File(path) as raw:
        groups = file.groups()
        assert [group.rows for group in groups] == [25, 25, 25, 20]
        rows = file.read(groups[0], 18, 23)
        node = raw[groups[0].path]
        assert np.array_equal(rows.pos, np.concatenate([node["coordinates"][18:], node["coordinatesHE"][:3]]))
        energies = np.concatenate([node["energies"][18:], node["energiesHE"][:3]])
        assert np.array_equal(rows.energy[:, 0], energies * HARTREE)


def test_ani1_joins_the_letters_of_its_smiles(tmp_path):
    with opened("ani1", raw_files.write_ani1(tmp_path / "raw.h5")) as file:
        names = [file.read(group, 0, 1).molecule[0] for group in file.groups()]
    assert names == [f"[{name}]" for name in raw_files.MOLECULES]


def test_the_formula_names_a_molecule_without_smiles(tmp_path):
    """Sorted by element: the order of the atoms does not matter."""
    molecules = {"a": [1, 8, 1], "b": [8, 1, 1], "c": [1, 6, 1, 1, 1]}
    with opened("ani1x", raw_files.write_ani1x(tmp_path / "raw.h5", molecules=molecules)) as file:
        assert [file.read(group, 0, 1).molecule[0] for group in file.groups()] == ["H2O", "H2O", "CH4"]
    path = raw_files.write_ani1x(tmp_path / "named.h5", smiles=True)
    with opened("ani1x", path) as file:
        group = file.groups()[0]
        assert file.read(group, 0, 4).molecule.tolist() == [f"[{group.path[1:]}]{i}" for i in (0, 1, 2, 0)]


@pytest.mark.parametrize("preset", plugins.find("preprocess.readers", "ani1x").PRESETS)
def test_every_ani1x_preset_equals_the_sum_of_its_keys(preset, tmp_path):
    """NaN where a summand is NaN, and only there; forces masked by their own key, not by that of the energy."""
    path = raw_files.write_ani1x(tmp_path / "raw.h5", rows=40)
    source = plugins.find("preprocess.readers", "ani1x").PRESETS[preset]
    with opened("ani1x", path, {preset: source}) as file, h5py.File(path) as raw:
        for name, (_, rows) in read_all(file).items():
            wanted = sum(raw[name][key][()] for key in source.energy_keys)
            assert np.array_equal(np.isnan(rows.energy[:, 0]), np.isnan(wanted))
            assert 0 < np.isnan(wanted).sum() < 10
            assert np.nanmax(np.abs(rows.energy[:, 0] - wanted * HARTREE)) < 1e-9
            if source.forces:
                wanted = raw[name][source.forces][()]
                assert np.array_equal(np.isnan(rows.forces[:, 0]), np.isnan(wanted))
                assert np.allclose(rows.forces[:, 0], wanted * HARTREE, rtol=1e-6, equal_nan=True)


# record C1H4N4O4, conformer 0, of the ANI-1x release (spec 9.2), Ha
RECORD = {
    "hf_dz.energy": -557.1375898559961,
    "hf_tz.energy": -557.3013494778872,
    "hf_qz.energy": -557.3426482230868,
    "mp2_dz.corr_energy": -1.5539720835219866,
    "mp2_tz.corr_energy": -1.9429519127460972,
    "mp2_qz.corr_energy": -2.0852302230766,
    "npno_ccsd(t)_dz.corr_energy": -1.6281721046206972,
    "npno_ccsd(t)_tz.corr_energy": -2.02456426080263,
    "tpno_ccsd(t)_dz.corr_energy": -1.6309148176133395,
    "ccsd(t)_cbs.energy": -559.6590647156545,
    "wb97x_dz.energy": -559.9673266512569,
    "wb97x_tz.energy": -560.215362918279,
}
RECORD_ATOMS = [6, 1, 1, 1, 1, 7, 7, 7, 7, 8, 8, 8, 8]


@pytest.fixture
def record(tmp_path):
    path = tmp_path / "record.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("C1H4N4O4")
        group["atomic_numbers"] = np.array(RECORD_ATOMS, np.uint8)
        group["coordinates"] = raw_files.conformations(RECORD_ATOMS, 1, np.random.default_rng(0))
        forces = np.zeros((1, 13, 3), np.float32)
        forces[0, 0] = 0.01657831, 0.00208556, 0.00961986
        for key in ("wb97x_dz", "wb97x_tz"):
            group[f"{key}.forces"] = forces
        for key, value in RECORD.items():
            group[key] = np.array([value])
    return path


def test_the_composition_record_of_ani1x(record):
    """Read through the presets, the parts give the stored CCSD(T)*/CBS energy by the formula of spec 9.2."""
    with opened("ani1x", record) as file:
        rows = file.read(file.groups()[0], 0, 1)
    e = dict(zip(plugins.find("preprocess.readers", "ani1x").PRESETS, rows.energy[0] / HARTREE, strict=True))
    assert e["mp2"] == pytest.approx(-559.2443013906333, abs=1e-10)
    alpha, beta = 5.46, 2.51
    three, four = math.exp(-alpha * 3**0.5), math.exp(-alpha * 4**0.5)
    hf = (e["hf_tz"] * four - e["hf_qz"] * three) / (four - three)
    corr = {x: e[f"mp2_{x}"] - e[f"hf_{x}"] for x in ("dz", "tz", "qz")}
    mp2 = (4**beta * corr["qz"] - 3**beta * corr["tz"]) / (4**beta - 3**beta)
    npno = {x: e[f"npno_ccsd(t)_{x}"] - e[f"hf_{x}"] for x in ("dz", "tz")}
    tpno = e["tpno_ccsd(t)_dz"] - e["hf_dz"]
    assert hf + mp2 + (npno["tz"] - corr["tz"]) + (tpno - npno["dz"]) == pytest.approx(e["cc"], abs=1e-8)
    assert e["cc"] == pytest.approx(RECORD["ccsd(t)_cbs.energy"], abs=1e-10)
    assert rows.forces[0, 0, 0] == pytest.approx(np.array([0.01657831, 0.00208556, 0.00961986]) * HARTREE, rel=1e-6)


def test_comp6_forces_go_downhill(tmp_path):
    """F·ΔR is -ΔE between near conformations, with the gradients of the file turned into forces."""
    with opened("comp6", raw_files.write_comp6(tmp_path / "raw.h5", rows=60)) as file:
        for _, rows in read_all(file).values():
            work = 0.5 * ((rows.forces[1:, 0] + rows.forces[:-1, 0]) * np.diff(rows.pos, axis=0)).sum(axis=(1, 2))
            drop = -np.diff(rows.energy[:, 0])
            assert np.corrcoef(work, drop)[0, 1] > 0.95
            assert work @ drop / (work @ work) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("kind", ["S1", "S2", "uint8", "int64", "object"])
def test_atoms_are_numbers_or_symbols_of_any_type(kind, tmp_path):
    path = raw_files.write_comp6(tmp_path / "raw.h5")
    with h5py.File(path, "a") as file:
        for group in file["s66x8"].values():
            symbols = group["species"][()]
            del group["species"]
            if kind == "object":
                group.create_dataset("species", data=[s.decode() for s in symbols], dtype=h5py.string_dtype())
            elif kind.startswith("S"):
                group["species"] = symbols.astype(kind)
            else:
                table = {"H": 1, "C": 6, "N": 7, "O": 8}
                group["species"] = np.array([table[s.decode()] for s in symbols], dtype=kind)
    with opened("comp6", path) as file:
        found = [rows.numbers.tolist() for _, rows in read_all(file).values()]
    assert found == list(raw_files.MOLECULES.values())


@pytest.mark.parametrize("dtype", [">f8", ">f4", "<f8"])
def test_byte_order_and_width_do_not_matter(dtype, tmp_path):
    path = raw_files.write_ani1x(tmp_path / "raw.h5", molecules={"H2O1": [8, 1, 1]})
    with h5py.File(path, "a") as file:
        pos = file["H2O1/coordinates"][()]
        del file["H2O1/coordinates"]
        file["H2O1/coordinates"] = pos.astype(dtype)
    with opened("ani1x", path) as file:
        assert np.array_equal(file.read(file.groups()[0], 0, 20).pos, pos)


def test_links_and_loops_are_harmless(tmp_path):
    """Soft and external links are not followed; a group that contains itself is visited once."""
    path = raw_files.write_comp6(tmp_path / "raw.h5")
    with h5py.File(path, "a") as file:
        file["s66x8/again"] = file["s66x8"]
        file["soft"] = h5py.SoftLink("/s66x8/molecule-0")
        file["nowhere"] = h5py.SoftLink("/absent")
        file["elsewhere"] = h5py.ExternalLink("absent.h5", "/x")
    with opened("comp6", path) as file:
        assert len(file.groups()) == len(raw_files.MOLECULES)


def test_a_group_that_cannot_be_read_is_named(tmp_path):
    path = raw_files.write_ani1(tmp_path / "raw.h5", rows=400)
    with opened("ani1", path) as file:
        groups = file.groups()
        dataset = file.file[groups[1].path]["coordinates"].id
        offset, size = dataset.get_chunk_info(0).byte_offset, dataset.get_chunk_info(0).size
    data = bytearray(path.read_bytes())
    data[offset + size // 2] ^= 0xFF
    path.write_bytes(data)
    with (
        opened("ani1", path) as file,
        pytest.raises(DataError, match=r"raw\.h5: cannot read group /gdb11_s03/gdb11_s03-1"),
    ):
        file.read(groups[1], 0, 400)
