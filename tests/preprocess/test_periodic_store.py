"""Periodic structures in a store: cells and directions of every row, images in the checks; molecules as before."""

import csv
import json

import boxes
import numpy as np
import pytest
import raw_files
import trajectory_files
from ase import Atoms
from in_process import rows, shard

from hpcmlip.data import inspection, verification
from hpcmlip.lattice import lacks_volume, nearest_distances


def config(folder, structures, **settings):
    trajectory_files.write_extxyz(folder / "raw.xyz", structures)
    return raw_files.write_config(folder, "raw.xyz", "extxyz", **({"split": {"by": "structure"}} | settings))


def mixed() -> list[Atoms]:
    """Molecules, slabs and crystals of one size among others."""
    flags = (True, (True, True, False), False)
    return boxes.labelled([atoms for i, pbc in enumerate(flags) for atoms in boxes.boxes(12, i, pbc=pbc)])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return shard(config(tmp_path_factory.mktemp("periodic"), mixed()))


def test_cells_and_directions_of_every_row(store):
    wanted = {round(atoms.get_potential_energy(), 10): atoms for atoms in mixed()}
    found = {name: rows(store, name) for name in ("energy", "pos", "cell", "pbc", "forces")}
    assert len(found["energy"]) == len(wanted) == 36
    for key, energy in found["energy"].items():
        atoms = wanted[min(wanted, key=lambda value: abs(value - energy[0]))]
        assert found["pbc"][key].tolist() == atoms.pbc.tolist()
        np.testing.assert_allclose(found["cell"][key], atoms.cell[:] * atoms.pbc.any(), atol=1e-7)
        np.testing.assert_allclose(found["pos"][key], atoms.positions, atol=1e-6)
        np.testing.assert_allclose(found["forces"][key][0], atoms.get_forces(), atol=1e-6)


def test_a_periodic_store_has_cells_and_no_adjacency(store):
    assert store.meta.periodic and store.meta.schema == 2
    names = set(store.root[store.meta.groups[0].path].array_keys())
    assert {"cell", "pbc"} <= names and "adjacency" not in names


def test_a_store_of_molecules_is_what_it_was(tmp_path):
    store = shard(config(tmp_path, trajectory_files.frames()))
    assert not store.meta.periodic and store.meta.schema == 1
    names = set(store.root[store.meta.groups[0].path].array_keys())
    assert "adjacency" in names and not names & {"cell", "pbc"}
    assert "periodic" not in json.loads((store.path / "zarr.json").read_text())["attributes"]["hpcmlip"]


def test_inspect_and_verify_know_them(store, capsys):
    assert inspection.describe(store)["periodic"] is True
    inspection.show(store.path)
    assert "periodic structures, each with its cell" in capsys.readouterr().out
    assert inspection.verify(store.path) == 0
    assert list(verification.check_files(store.path)) == []


def test_verify_finds_a_cell_without_volume(store, tmp_path):
    """Chunk by chunk: the file check would see the change too."""
    from shutil import copytree

    import zarr

    copy = tmp_path / "copy.zarr"
    copytree(store.path, copy)
    group = store.meta.groups[0]
    files = {p: p.stat().st_size for p in (copy / group.path / "cell").rglob("*") if p.is_file()}
    cells = zarr.open_group(copy, mode="r+")[f"{group.path}/cell"]
    row = int(np.flatnonzero(store.read(group, "pbc", 0, group.rows).all(axis=1))[0])
    values = cells[row]
    values[1] = values[0]
    cells[row] = values
    manifest = json.loads((copy / "manifest.json").read_text())
    for path in files:
        manifest["files"][path.relative_to(copy).as_posix()]["size"] = path.stat().st_size
    from hpcmlip.data.store import manifest_digest

    manifest["digest"] = manifest_digest(manifest["files"])
    (copy / "manifest.json").write_text(json.dumps(manifest))
    problems = [problem for _, found in verification.check_chunks(copy) for problem in found]
    assert problems == [f"{group.path}: rows 0 to {group.rows}: cell of row {row} has no volume"]


def test_atoms_too_close_across_the_border_and_flat_cells_are_quarantined(tmp_path):
    good = boxes.labelled(boxes.boxes(150, formulas=["H2O1"]))
    near, flat = good[7].copy(), good[8].copy()
    near.set_cell([near.cell[0], near.cell[1], [0, 0, 0.2]])  # its own image
    flat.cell[2] = flat.cell[0] + flat.cell[1]
    bad = boxes.labelled([near])[0]
    flat.calc = good[8].calc
    structures = [*good[:50], bad, *good[50:]]
    store = shard(config(tmp_path, structures))
    assert store.meta.quarantined == 1 and store.meta.num_structures == 150
    with open(store.path / "quarantine.csv", newline="") as file:
        (entry,) = csv.DictReader(file)
    assert (entry["row"], entry["reason"], entry["value"]) == ("50", "atoms too close", "0.2000")
    (tmp_path / "flat").mkdir()
    store = shard(config(tmp_path / "flat", [*good[:9], flat, *good[9:]]))
    with open(store.path / "quarantine.csv", newline="") as file:
        (entry,) = csv.DictReader(file)
    assert (entry["row"], entry["reason"]) == ("9", "cell without volume")


def test_nearest_distances_count_images():
    pos = np.array([[[0.1, 0, 0], [9.9, 0, 0]]])
    cell = 10 * np.eye(3)[None]
    for flags, wanted in (((True,) * 3, 0.2), ((True, False, False), 0.2), ((False, True, True), np.inf)):
        assert nearest_distances(pos, cell, np.array([flags]), 2.0)[0] == pytest.approx(wanted)
    # a single atom and its image
    thin = np.diag([0.3, 10, 10])[None]
    assert nearest_distances(pos[:, :1], thin, np.ones((1, 3), bool), 1.0)[0] == pytest.approx(0.3)


def test_lacks_volume():
    cell = np.stack([np.eye(3), np.zeros((3, 3)), np.diag([1.0, 1, 0]), np.diag([1, 1, np.nan]), np.ones((3, 3))])
    assert lacks_volume(cell, np.ones((5, 3), bool)).tolist() == [False, True, True, True, True]
    assert lacks_volume(cell, np.tile([True, True, False], (5, 1))).tolist() == [False, True, False, False, True]
    assert not lacks_volume(cell, np.zeros((5, 3), bool)).any()
    metres = 1e-9 * np.eye(3)[None]
    assert lacks_volume(metres, np.ones((1, 3), bool)).tolist() == [True]


def test_ionic_liquid_and_lattice_of_md17_make_periodic_stores(tmp_path):
    trajectory_files.write_lines(tmp_path / "raw.json", trajectory_files.liquid(60))
    liquid = shard(raw_files.write_config(tmp_path, "raw.json", "ionic_liquid", split={"by": "structure"}))
    assert liquid.meta.periodic and liquid.meta.groups[0].num_atoms == 30
    crystal = tmp_path / "crystal"
    crystal.mkdir()
    arrays = trajectory_files.md17("H3N1") | {"lattice": np.diag([6.0, 7, 8])}
    trajectory_files.write_npz(crystal / "raw.npz", arrays)
    store = shard(raw_files.write_config(crystal, "raw.npz", "md17", split={"by": "structure"}))
    assert store.meta.periodic and store.meta.num_structures == 87


def test_jumps_through_the_border_do_not_pass_for_motion(tmp_path):
    """Frame by frame along a trajectory, atoms put back into the cell: forces are still those of the energies."""
    (start,) = boxes.boxes(1)
    path = []
    for step in range(80):
        atoms = start.copy()
        atoms.positions += 0.05 * step
        atoms.rattle(0.02, seed=step)
        atoms.wrap()
        path.append(atoms)
    store = shard(config(tmp_path, boxes.labelled(path)))
    assert store.meta.num_structures == 80
