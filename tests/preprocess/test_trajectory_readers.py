"""MD17, extended XYZ and the ionic liquid: what is read is what the file was written from, in Å and eV."""

import gzip

import ase.io
import boxes
import numpy as np
import pytest
import raw_files
import trajectory_files
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from in_process import rows, shard, splits

from hpcmlip import plugins
from hpcmlip.data import inspection
from hpcmlip.errors import DataError
from hpcmlip.preprocess.config import LevelSource
from hpcmlip.preprocess.readers import RawLevel
from hpcmlip.units import BOHR, HARTREE


def opened(reader: str, path, levels: dict[str, LevelSource] | None = None):
    module = plugins.find("preprocess.readers", reader)
    chosen = levels or {name: module.PRESETS[name] for name in module.DEFAULT_LEVELS}
    return module.open_file(path, tuple(RawLevel(*item) for item in chosen.items()), {})


def check_equal(read, data) -> None:
    """`Rows` against `trajectory_files.sample`; one rounding to float32 and the decimals of a text file apart."""
    assert read.numbers.tolist() == data["numbers"].tolist()
    np.testing.assert_allclose(read.pos, data["pos"], atol=2e-6)
    np.testing.assert_allclose(read.energy[:, 0], data["energy"], rtol=1e-11)
    np.testing.assert_allclose(read.forces[:, 0], data["forces"], rtol=1e-6, atol=2e-7)


# ---------------------------------------------------------------------------------------------------------- MD17


def _revised(arrays):
    names = {"z": "nuclear_charges", "R": "coords", "E": "energies", "F": "forces"}
    return {new: arrays[old] for old, new in names.items()} | {"energies": arrays["E"][:, 0]}


def _without_units(arrays):
    return {name: x for name, x in arrays.items() if not name.endswith("_unit")}


def _atomic_units(arrays):
    kcal = trajectory_files.KCAL_PER_MOL / HARTREE
    return arrays | {
        "R": arrays["R"] / BOHR,
        "E": arrays["E"] * kcal,
        "F": arrays["F"] * kcal * BOHR,
        "r_unit": np.array("bohr"),
        "e_unit": np.array("Ha"),
    }


VARIANTS = {"md17": dict, "revised": _revised, "without units": _without_units, "atomic units": _atomic_units}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compressed", [True, False])
def test_md17_variants(variant, compressed, tmp_path):
    arrays = VARIANTS[variant](trajectory_files.md17())
    path = trajectory_files.write_npz(tmp_path / "ethanol.npz", arrays, compressed=compressed)
    with opened("md17", path) as file:
        (group,) = file.groups()
        assert (group.path, group.rows, group.num_atoms) == ("/ethanol", 47, 9)
        whole, part = file.read(group, 0, 47), file.read(group, 11, 30)
    check_equal(whole, trajectory_files.sample("C2H6O1"))
    assert set(whole.molecule) == {"C2H6O"} and whole.cell is None
    assert np.array_equal(part.energy, whole.energy[11:30]) and np.array_equal(part.forces, whole.forces[11:30])


def test_md17_lattice_vectors_are_columns(tmp_path):
    columns = np.array([[5.0, 1.0, 0.0], [0.0, 6.0, 2.0], [0.0, 0.0, 7.0]])
    arrays = trajectory_files.md17() | {"lattice": columns}
    with opened("md17", trajectory_files.write_npz(tmp_path / "crystal.npz", arrays)) as file:
        read = file.read(file.groups()[0], 3, 5)
    assert read.pbc.all() and np.array_equal(read.cell, [columns.T, columns.T])


def test_md17_a_changed_file_is_read_anew(tmp_path):
    path = tmp_path / "ethanol.npz"
    for formula in ("C2H6O1", "C2H6"):
        with opened("md17", trajectory_files.write_npz(path, trajectory_files.md17(formula))) as file:
            (group,) = file.groups()
            check_equal(file.read(group, 0, group.rows), trajectory_files.sample(formula))


# --------------------------------------------------------------------------------------------------- extended XYZ


def test_extxyz_frames_of_many_molecules(tmp_path):
    path = trajectory_files.write_extxyz(tmp_path / "raw.xyz", trajectory_files.frames())
    with opened("extxyz", path) as file:
        groups = file.groups()
        assert [group.path.split("/")[1] for group in groups] == ["CH4", "CH4O", "H3N"]
        for group, formula in zip(groups, ("C1H4", "C1H4O1", "H3N1"), strict=True):
            read = file.read(group, 0, group.rows)
            check_equal(read, trajectory_files.sample(formula, 8))
            assert not read.pbc.any() and not read.cell.any()
            part = file.read(group, 3, 6)
            assert np.array_equal(part.pos, read.pos[3:6]) and np.array_equal(part.energy, read.energy[3:6])


def test_extxyz_groups_go_by_the_elements_in_order(tmp_path):
    water = [Atoms("OHH", np.eye(3)), Atoms("HOH", np.eye(3)), Atoms("OHH", 2 * np.eye(3))]
    for atoms in water:
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((3, 3)))
    with opened("extxyz", trajectory_files.write_extxyz(tmp_path / "raw.xyz", water)) as file:
        groups = file.groups()
        read = [file.read(group, 0, group.rows) for group in groups]
    assert sorted((group.rows, tuple(r.numbers)) for group, r in zip(groups, read, strict=True)) == [
        (1, (1, 8, 1)),
        (2, (8, 1, 1)),
    ]
    assert {name for r in read for name in r.molecule} == {"H2O"}


def test_extxyz_cells_and_periodic_directions(tmp_path):
    structures = [boxes.boxes(2, pbc=flags)[1] for flags in (True, (True, True, False), False)]
    structures = boxes.labelled(structures)
    with opened("extxyz", trajectory_files.write_extxyz(tmp_path / "raw.xyz", structures)) as file:
        read = file.read(file.groups()[0], 0, 3)
    assert read.pbc.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    for row, atoms in enumerate(structures[:2]):
        np.testing.assert_allclose(read.cell[row], atoms.cell, atol=1e-7)
    # the box around a molecule is none of its cell
    assert not read.cell[2].any()


def test_extxyz_other_keys_and_labels_that_some_frames_lack(tmp_path):
    structures = trajectory_files.frames(["H3N1"], 4)
    data = trajectory_files.sample("H3N1", 4)
    for i, atoms in enumerate(structures):
        atoms.calc = None
        if i != 1:
            atoms.info["REF_energy"] = data["energy"][i]
        if i != 2:
            atoms.arrays["REF_forces"] = data["forces"][i]
        atoms.info["tb_energy"] = float(i)
    path = trajectory_files.write_extxyz(tmp_path / "raw.xyz", structures)
    levels = {"dft": LevelSource(energy="REF_energy", forces="REF_forces"), "tb": LevelSource(energy="tb_energy")}
    with opened("extxyz", path, levels) as file:
        read = file.read(file.groups()[0], 0, 4)
    assert np.isfinite(read.energy[:, 0]).tolist() == [True, False, True, True]
    assert np.isfinite(read.forces).all(axis=(1, 2, 3)).tolist() == [True, True, False, True]
    assert read.energy[:, 1].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(read.energy[0, 0], data["energy"][0], rtol=1e-11)
    np.testing.assert_allclose(read.forces[3, 0], data["forces"][3], atol=2e-7)


def test_extxyz_as_others_write_it(tmp_path):
    """Atomic numbers for symbols, quotes, columns in another order, a plain XYZ frame, blank lines at the end."""
    path = tmp_path / "raw.xyz"
    path.write_text(
        '2\nProperties="forces:R:3:Z:I:1:pos:R:3" energy=-1.5 Lattice="4 0 0 0 5 0 0 0 6"\n'
        "1 0 0 8 0 0 0\n-1 0 0 1 0 0 0.97\n"
        "2\na comment\nO 0 0 0\nH 0 0 1.0\n\n\n"
    )
    with opened("extxyz", path) as file:
        (group,) = file.groups()
        read = file.read(group, 0, 2)
    assert read.numbers.tolist() == [8, 1]
    assert read.energy[0, 0] == -1.5 and np.isnan(read.energy[1, 0])
    assert read.forces[0, 0].tolist() == [[1, 0, 0], [-1, 0, 0]]
    assert np.array_equal(read.cell[0], np.diag([4, 5, 6])) and read.pbc.tolist() == [[True] * 3, [False] * 3]


def test_extxyz_reads_no_more_than_the_frames_asked_for(tmp_path, monkeypatch):
    path = trajectory_files.write_extxyz(tmp_path / "raw.xyz", trajectory_files.frames(rows=20))
    with opened("extxyz", path) as file:
        group = file.groups()[0]
        size = []
        plain = file.file

        class Counting:
            seek = plain.seek

            def read(self, count):
                size.append(count)
                return plain.read(count)

        file.file = Counting()
        file.read(group, 4, 6)
        file.file = plain
    assert len(size) == 2 and sum(size) < path.stat().st_size / 20


# --------------------------------------------------------------------------------------------------- ionic liquid


def test_ionic_liquid(tmp_path):
    configurations = trajectory_files.liquid()
    with opened("ionic_liquid", trajectory_files.write_lines(tmp_path / "raw.json", configurations)) as file:
        (group,) = file.groups()
        assert (group.rows, group.num_atoms) == (12, 30)
        read = file.read(group, 2, 9)
    cation, anion = [7, 1, 1, 1, 6, 1, 1, 6, 1, 1, 1], [7, 8, 8, 8]
    assert read.numbers.tolist() == 2 * cation + 2 * anion
    assert set(read.molecule) == {"C4H16N4O6"} and read.pbc.all()
    for row, each in enumerate(configurations[2:9]):
        np.testing.assert_allclose(read.pos[row], each["Positions"], atol=1e-6)
        np.testing.assert_allclose(read.forces[row, 0], each["Forces"], rtol=1e-6, atol=1e-6)
        assert read.energy[row, 0] == each["Energy"]
        assert np.array_equal(read.cell[row], np.diag(each["Cell-Size"]))


# --------------------------------------------------------------------------------------------- files that are not so


def npz(edit):
    def write(path):
        trajectory_files.write_npz(path, edit(trajectory_files.md17("H3N1")))

    return write


def xyz(edit):
    def write(path):
        text = trajectory_files.write_extxyz(path, trajectory_files.frames()).read_text()
        path.write_text(edit(text))

    return write


def lines(edit):
    def write(path):
        configurations = trajectory_files.liquid()
        path.write_text(edit(trajectory_files.write_lines(path, configurations).read_text().splitlines(keepends=True)))

    return write


def cut(part: float):
    def write(path):
        trajectory_files.write_npz(path, trajectory_files.md17())
        data = path.read_bytes()
        path.write_bytes(data[: int(part * len(data))])

    return write


def drop(key):
    return lambda arrays: {name: x for name, x in arrays.items() if name != key}


def put(**values):
    return lambda arrays: arrays | values


def fourth(text: str, old: str, new: str) -> str:
    """Replace what stands in the fourth frame (number 3)."""
    head, tail = text[: _frame(text, 3)], text[_frame(text, 3) :]
    return head + tail.replace(old, new, 1)


def _frame(text: str, number: int) -> int:
    lines_, at = text.splitlines(keepends=True), 0
    for _ in range(number):
        at += int(lines_[at]) + 2
    return sum(map(len, lines_[:at]))


BAD = {
    ("md17", "empty"): (lambda path: path.write_bytes(b""), "is empty"),
    ("md17", "text"): (lambda path: path.write_text("H 0 0 0\n" * 99), "is no npz file"),
    ("md17", "cut at 20 %"): (cut(0.2), "truncated or damaged"),
    ("md17", "cut at 99 %"): (cut(0.99), "truncated or damaged"),
    ("md17", "no elements"): (npz(drop("z")), "lacks the key 'z'"),
    ("md17", "no forces"): (npz(drop("F")), "lacks the key 'F', which level 'dft' needs"),
    ("md17", "unknown energy unit"): (npz(put(e_unit=np.array("Ry"))), "e_unit is 'Ry', expected one of ev"),
    ("md17", "unknown length unit"): (npz(put(r_unit=np.array(b"nm"))), "r_unit is 'nm', expected one of ang"),
    ("md17", "transposed"): (npz(lambda a: a | {"R": a["R"].transpose(0, 2, 1)}), "(87, 3, 4), expected (n, 4, 3)"),
    ("md17", "fewer energies"): (npz(lambda a: a | {"E": a["E"][:7]}), "'E' has the shape (7, 1), expected (87,)"),
    ("md17", "forces of one"): (npz(lambda a: a | {"F": a["F"][0]}), "'F' has the shape (4, 3), expected (87, 4, 3)"),
    ("md17", "symbols"): (npz(put(z=np.array(list("NHHH")))), "expected atomic numbers"),
    ("md17", "integers"): (npz(lambda a: a | {"E": a["E"].astype(int)}), "expected float32 or float64"),
    ("md17", "objects"): (npz(lambda a: a | {"R": a["R"].astype(object)}), "is no npz file"),
    ("md17", "no labels"): (npz(lambda a: a | {"E": a["E"] * np.nan, "F": a["F"] * np.nan}), "carries a label"),
    ("md17", "gradients"): (npz(lambda a: a | {"F": -a["F"]}), "point uphill"),
    ("extxyz", "empty"): (lambda path: path.write_text(""), "is empty"),
    ("extxyz", "cut"): (xyz(lambda text: text[: int(0.43 * len(text))]), "is the file truncated?"),
    ("extxyz", "no number"): (xyz(lambda text: "x" + text), "frame 0: expected a number of atoms"),
    ("extxyz", "compressed"): (
        lambda path: path.write_bytes(gzip.compress(b"2\n\nH 0 0 0\nH 0 0 1\n")),
        "frame 0: expected a number of atoms, got binary data",
    ),
    ("extxyz", "Latin-1"): (
        lambda path: path.write_bytes("2\nin Å\nH 0 0 0\nH 0 0 1\n".encode("latin-1")),
        "frame 0: the comment line is not UTF-8",
    ),
    ("extxyz", "no labels"): (
        lambda path: path.write_text("2\n\nH 0 0 0\nH 0 0 1\n"),
        "no frame has the key 'energy', which level 'reference' needs (there are only those of the structures",
    ),
    ("extxyz", "a blank line between"): (
        xyz(lambda text: text[: _frame(text, 3)] + "\n" + text[_frame(text, 3) :]),
        "frame 3: expected a number of atoms, got a blank line",
    ),
    ("extxyz", "one atom too few"): (
        xyz(lambda text: text.replace("5\n", "6\n", 1)),
        "frame 1: expected a number of atoms",
    ),
    ("extxyz", "a huge number"): (xyz(lambda text: fourth(text, "5\n", "999999999999\n")), "frame 3:"),
    ("extxyz", "no energy"): (
        xyz(lambda text: text.replace("energy=", "enargy=")),
        "no frame has the key 'energy', which level 'reference' needs (did you mean 'enargy'?",
    ),
    ("extxyz", "no forces"): (
        xyz(lambda text: text.replace("forces:R:3", "momenta:R:3")),
        "no frame has the key 'forces', which level 'reference' needs",
    ),
    ("extxyz", "energy is a word"): (
        xyz(lambda text: fourth(text, "energy=", "energy=much was=")),
        "frame 3: 'energy'",
    ),
    ("extxyz", "forces are two columns"): (
        xyz(lambda text: fourth(text, "forces:R:3", "forces:R:2:rest:R:1")),
        "frame 3: 'forces' has the shape (5, 2), expected (5, 3)",
    ),
    ("extxyz", "a word for a coordinate"): (
        xyz(lambda text: fourth(text, "H  ", "H  x")),
        "frame 3: ASE cannot read it",
    ),
    ("extxyz", "no element"): (xyz(lambda text: fourth(text, "\nC ", "\nQq ")), "frame 3: 'Qq' is no element"),
    ("extxyz", "no positions"): (xyz(lambda text: fourth(text, "pos:R:3", "xyz:R:3")), "frame 3: Properties must name"),
    ("ionic_liquid", "empty"): (lambda path: path.write_text(""), "is empty"),
    ("ionic_liquid", "blank"): (lambda path: path.write_text("\n\n"), "the sources hold no conformation"),
    ("ionic_liquid", "text"): (lambda path: path.write_text("H 0 0 0\n" * 99), "line 1: is no JSON"),
    ("ionic_liquid", "cut"): (lines(lambda all_: "".join(all_)[:-300]), "line 12: is no JSON"),
    ("ionic_liquid", "a list"): (
        lines(lambda all_: "".join([*all_[:4], "[1]\n", *all_[5:]])),
        "line 5: holds no JSON object",
    ),
    ("ionic_liquid", "another size"): (
        lines(lambda all_: "".join(all_).replace("], [", "], [0, 0, 0], [", 1)),
        "line 1: has 31 atoms, expected a multiple of the 15",
    ),
    ("ionic_liquid", "no energy"): (
        lines(lambda all_: "".join([*all_[:4], all_[4].replace("Energy", "energy"), *all_[5:]])),
        "line 5: lacks the key 'Energy' (did you mean 'energy'?",
    ),
    ("ionic_liquid", "a word"): (
        lines(lambda all_: "".join([*all_[:4], all_[4].replace('"Energy": ', '"Energy": "x", "y": '), *all_[5:]])),
        "line 5: 'Energy' holds something else than numbers",
    ),
    ("ionic_liquid", "a number for the cell"): (
        lines(lambda all_: "".join([*all_[:4], all_[4].replace('"Cell-Size": ', '"Cell-Size": 5, "y": '), *all_[5:]])),
        "line 5: 'Cell-Size' has the shape (), expected (3,)",
    ),
}


@pytest.mark.parametrize(("reader", "case"), BAD)
def test_bad_files_end_in_a_sentence(reader, case, tmp_path):
    write, says = BAD[reader, case]
    path = tmp_path / ("raw.npz" if reader == "md17" else "raw.txt")
    write(path)
    config = raw_files.write_config(tmp_path, path.name, reader, split={"by": "structure"})
    with pytest.raises(DataError) as raised:
        shard(config)
    assert says in str(raised.value), str(raised.value)
    assert "raw" in str(raised.value) or "conformation" in str(raised.value)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize(
    ("reader", "case"),
    [("md17", "cut at 99 %"), ("extxyz", "a word for a coordinate"), ("ionic_liquid", "cut")],
)
def test_bad_files_through_the_command_line(reader, case, tmp_path, cli):
    write, says = BAD[reader, case]
    path = tmp_path / ("raw.npz" if reader == "md17" else "raw.txt")
    write(path)
    config = raw_files.write_config(tmp_path, path.name, reader, split={"by": "structure"})
    finished = cli("shard", config, "--workers", 1, expect=1)
    assert says in finished.stderr and "Traceback" not in finished.output
    assert not (tmp_path / "out.zarr").exists()


def test_one_molecule_cannot_be_split_by_molecule(tmp_path):
    trajectory_files.write_npz(tmp_path / "raw.npz", trajectory_files.md17())
    config = raw_files.write_config(tmp_path, "raw.npz", "md17", split={"by": "molecule", "seed": 1})
    for seed in range(20):
        config = raw_files.write_config(tmp_path, "raw.npz", "md17", split={"by": "molecule", "seed": seed})
        try:
            shard(config, f"out={tmp_path}/{seed}.zarr")
        except DataError as error:
            assert "the split 'train' is empty" in str(error) and "another split.by" in str(error)
            return
    pytest.fail("the molecule was always trained on")


# --------------------------------------------------------------------------------------------------- into the store


def test_inspect_says_that_one_composition_has_no_atomic_energies(tmp_path, capsys):
    trajectory_files.write_npz(tmp_path / "raw.npz", trajectory_files.md17("H3N1"))
    store = shard(raw_files.write_config(tmp_path, "raw.npz", "md17", split={"by": "structure"}))
    capsys.readouterr()
    inspection.show(store.path)
    text = capsys.readouterr().out
    assert "too few compositions" in text
    (row,) = [line for line in text.splitlines() if "energy" in line and "unknown" in line]
    _, _, _, _, _, _, hydrogen, carbon, nitrogen, oxygen, *_ = (cell.strip() for cell in row.split("│"))
    assert hydrogen.startswith("-") and nitrogen.startswith("-") and carbon == oxygen == ""


def test_other_elements_than_those_of_organic_molecules(tmp_path):
    salt = []
    for i in range(20):
        atoms = Atoms("NaClLi", [[0, 0, 0], [2.4 + 0.01 * i, 0, 0], [0, 2.5, 0]])
        atoms.calc = SinglePointCalculator(atoms, energy=-3.0 - i, forces=np.zeros((3, 3)))
        salt.append(atoms)
    trajectory_files.write_extxyz(tmp_path / "raw.xyz", salt)
    config = raw_files.write_config(tmp_path, "raw.xyz", "extxyz", split={"by": "structure"})
    with pytest.raises(DataError, match=r"unknown element \(Li Na Cl\).*check elements"):
        shard(config)
    store = shard(config, "elements=[Li, Na, Cl]")
    assert store.meta.elements == (3, 11, 17) and store.meta.num_structures == 20
    assert {tuple(z) for z in rows(store, "z").values()} == {(11, 17, 3)}


def test_all_frames_reach_the_store(tmp_path):
    trajectory_files.write_extxyz(tmp_path / "raw.xyz", trajectory_files.frames())
    store = shard(raw_files.write_config(tmp_path, "raw.xyz", "extxyz", split={"by": "structure"}))
    energies = sorted(float(e[0]) for e in rows(store, "energy").values())
    wanted = sorted(atoms.get_potential_energy() for atoms in ase.io.read(tmp_path / "raw.xyz", index=":"))
    assert energies == wanted
    assert not store.meta.periodic and set(splits(store).values()) == {"train", "val", "test"}
