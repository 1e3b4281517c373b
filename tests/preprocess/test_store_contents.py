"""What ends up in a store is what the raw file holds, read here by h5py alone; and the layout is the documented one."""

import h5py
import numpy as np
import pytest
import raw_files
from in_process import rows, shard, splits

from hpcmlip import configs
from hpcmlip.data import adjacency, offsets
from hpcmlip.data.store import SPLITS, energy_bit, forces_bit
from hpcmlip.units import HARTREE, formula

SAMPLES = {
    "ab_initio_small": [("wb97x_dz.energy", "wb97x_dz.forces"), ("ccsd(t)_cbs.energy", None)],
    "xtb_tiny": [("gfn1_xtb.energy", "gfn1_xtb.forces"), ("gfn2_xtb.energy", "gfn2_xtb.forces")],
}


@pytest.fixture(scope="module", params=SAMPLES)
def sample(request, tmp_path_factory):
    """(store, raw HDF5 file, keys of its levels) of an embedded sample, sharded by its own config."""
    out = tmp_path_factory.mktemp("store") / "out.zarr"
    store = shard(configs.path(f"data/{request.param}.yaml"), f"out={out}")
    with h5py.File(configs.path(f"samples/{request.param}.h5")) as raw:
        yield store, raw, SAMPLES[request.param]


def test_every_value_of_the_sample(sample):
    store, raw, keys = sample
    paths = sorted(raw)
    z, pos, energy, forces = (rows(store, name) for name in ("z", "pos", "energy", "forces"))
    assert len(z) == store.meta.num_structures == sum(len(raw[path]["coordinates"]) for path in paths)
    for (_, group, row), value in pos.items():
        node = raw[paths[group]]
        here = (0, group, row)
        assert np.array_equal(value, node["coordinates"][row])
        assert np.array_equal(z[here], node["atomic_numbers"][()])
        wanted = [node[key][row] * HARTREE for key, _ in keys]
        assert np.abs(energy[here] - wanted).max() < 1e-9
        planes = [node[key][row].astype(np.float64) * HARTREE for _, key in keys if key]
        assert np.array_equal(forces[here], np.array(planes, dtype=np.float32))


def test_the_molecule_of_every_row(sample):
    store, raw, _ = sample
    paths = sorted(raw)
    smiles = {path: raw[path]["smiles"][()].astype(str) for path in paths}
    names = [bytes(key).rstrip(b"\0").decode() for key in store.root["molecules"][:]]
    assert names == sorted(set(names)) and len(names) == store.meta.num_molecules
    for (_, group, row), molecule in rows(store, "molecule").items():
        assert names[molecule] == smiles[paths[group]][row]


def test_rows_are_sorted_and_segments_say_what_they_hold(sample):
    store, _, _ = sample
    by_key = {}
    for group in store.meta.groups:
        assert [s.start for s in group.segments] == [0, *(s.stop for s in group.segments)][:-1]
        assert group.segments[-1].stop == group.rows
        order = [(SPLITS.index(s.split), s.labels) for s in group.segments]
        assert order == sorted(set(order))
        assert group.rows_per_shard % group.rows_per_chunk == 0
        for s in group.segments:
            source = store.read(group, "source", s.start, s.stop).tolist()
            assert source == sorted(source)
        if store.meta.split["by"] == "molecule":
            for s in group.segments:
                for molecule in np.unique(store.read(group, "molecule", s.start, s.stop)).tolist():
                    assert by_key.setdefault(molecule, s.split) == s.split


def test_adjacency_is_who_is_near(sample):
    store, _, _ = sample
    for group in store.meta.groups:
        N = group.num_atoms
        bits = np.unpackbits(store.read(group, "adjacency", 0, group.rows), axis=1)[:, : N * N].reshape(-1, N, N)
        pos = store.read(group, "pos", 0, group.rows).astype(np.float64)
        dist = np.linalg.norm(pos[:, :, None] - pos[:, None], axis=-1)
        near = (dist < store.meta.cutoff) & ~np.eye(N, dtype=bool)
        clear = np.abs(dist - store.meta.cutoff) > 1e-4
        assert np.array_equal(bits.astype(bool)[clear], near[clear])


def test_adjacency_of_a_short_cutoff():
    pos = np.array([[[0, 0, 0], [1, 0, 0], [2.5, 0, 0]]], dtype=np.float32)
    assert np.unpackbits(adjacency.pack(pos, 2.0))[:9].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_offsets_are_the_least_squares_fit_of_the_training_split(sample):
    store, _, _ = sample
    meta, train = store.meta, [key for key, split in splits(store).items() if split == "train"]
    energy, z = rows(store, "energy"), rows(store, "z")
    counts = np.array([[(z[key] == element).sum() for element in meta.elements] for key in train], dtype=float)
    for i, level in enumerate(meta.levels):
        label = np.array([energy[key][i] for key in train])
        isolated = offsets.isolated_energies(level, meta.elements)
        assert isolated.all()
        solution, *_ = np.linalg.lstsq(counts, label - counts @ isolated, rcond=None)
        found, rms = offsets.atomic_energies(meta.offsets[i])
        assert found == pytest.approx(solution, abs=1e-6)
        rest = label - counts @ (isolated + solution)
        assert rms == pytest.approx(np.sqrt((rest**2).mean()), rel=1e-6)
        assert meta.offsets[i].count == len(train)


def test_label_masks_of_missing_labels(tmp_path):
    """Every key of ANI-1x misses other rows: masks follow each key on its own, unlabelled planes are NaN."""
    raw_files.write_ani1x(tmp_path / "raw.h5", rows=51)
    config = raw_files.write_config(tmp_path, "raw.h5", "ani1x", split={"by": "structure"})
    store = shard(config)
    assert [level.name for level in store.meta.levels] == ["dz", "tz", "mp2", "cc"]
    assert store.meta.force_levels == (0, 1)
    with h5py.File(tmp_path / "raw.h5") as raw:
        paths = sorted(raw)
        for group in store.meta.groups:
            for s in group.segments:
                source = store.read(group, "source", s.start, s.stop)
                energy, forces = (store.read(group, name, s.start, s.stop) for name in ("energy", "forces"))
                for i, (_, ordinal, row) in enumerate(source.tolist()):
                    node = raw[paths[ordinal]]
                    sums = [("wb97x_dz.energy",), ("wb97x_tz.energy",)]
                    sums += [("hf_tz.energy", "mp2_tz.corr_energy"), ("ccsd(t)_cbs.energy",)]
                    labels = 0
                    for level, keys in enumerate(sums):
                        value = sum(node[key][row] for key in keys)
                        assert np.isnan(value) == np.isnan(energy[i, level])
                        labels |= 0 if np.isnan(value) else energy_bit(level)
                    for plane, key in enumerate(("wb97x_dz.forces", "wb97x_tz.forces")):
                        there = np.isfinite(node[key][row]).all()
                        assert np.isfinite(forces[i, plane]).all() == there
                        labels |= forces_bit(plane) if there else 0
                    assert labels == s.labels
    assert store.meta.num_structures == 51 * len(raw_files.MOLECULES)


def test_rows_without_any_label_are_left_out(tmp_path):
    raw_files.write_ani1x(tmp_path / "raw.h5", rows=40)
    config = raw_files.write_config(tmp_path, "raw.h5", "ani1x", levels={"cc": "cc"}, split={"by": "structure"})
    store = shard(config)
    assert store.meta.num_structures == 4 * 37 and store.meta.quarantined == 0
    assert "forces" not in store.root["n005"]


@pytest.mark.parametrize("by", ["molecule", "formula", "structure"])
def test_what_is_split_together(by, tmp_path):
    molecules = {f"m{i}": [6, *[1] * (i % 4)] for i in range(12)}
    raw_files.write_ani1x(tmp_path / "raw.h5", rows=60, molecules=molecules, smiles=True)
    store = shard(raw_files.write_config(tmp_path, "raw.h5", "ani1x", split={"by": by, "fractions": [0.5, 0.25, 0.25]}))
    found, z, molecule = splits(store), rows(store, "z"), rows(store, "molecule")
    keys = {"molecule": lambda k: int(molecule[k]), "formula": lambda k: formula(z[k]), "structure": lambda k: k}[by]
    together = {}
    for row, split in found.items():
        together.setdefault(keys(row), set()).add(split)
    assert all(len(parts) == 1 for parts in together.values())
    assert {split for parts in together.values() for split in parts} >= {"train"}
    if by == "structure":
        assert len({found[key] for key in found if key[1] == 0}) == 3


@pytest.mark.parametrize("numbers", [[8], [1, 1], [6] * 65])
def test_sizes_at_the_edges(numbers, tmp_path):
    """A single atom, a pair, and more atoms than adjacency is stored for."""
    with h5py.File(tmp_path / "raw.h5", "w") as file:
        group = file.create_group("g")
        N = len(numbers)
        grid = 2.0 * np.array([[x, y, z] for x in range(5) for y in range(5) for z in range(5)], dtype=np.float32)[:N]
        group["coordinates"] = grid + np.zeros((9, 1, 1), np.float32)
        group["species"] = np.array(numbers, np.uint8)
        group["energies"] = np.full(9, -1.0)
    levels = {"x": {"energy": "energies"}}
    store = shard(raw_files.write_config(tmp_path, "raw.h5", "ani1", levels=levels, split={"by": "structure"}))
    assert store.meta.groups[0].path == f"n{len(numbers):03d}" and store.meta.num_structures == 9
    assert ("adjacency" in store.root[store.meta.groups[0].path]) == (len(numbers) <= 64)


def test_many_sources_keep_their_names(tmp_path):
    for i in range(3):
        raw_files.write_comp6(tmp_path / f"part{i}.h5", seed=i)
    config = raw_files.write_config(tmp_path, "part*.h5", "comp6", split={"by": "structure"})
    store = shard(config)
    assert [source.name for source in store.meta.sources] == ["part0.h5", "part1.h5", "part2.h5"]
    assert store.meta.num_structures == 3 * 4 * 20
    pos = rows(store, "pos")
    for i in range(3):
        with h5py.File(tmp_path / f"part{i}.h5") as raw:
            assert np.array_equal(pos[(i, 2, 7)], raw["s66x8/molecule-2/coordinates"][7])
