"""Periodic structures: derivatives of what the calculator says, supercells, files, and the whole way by CLI."""

import json
from pathlib import Path

import ase.io
import boxes
import numpy as np
import pytest
import torch
import zarr
from ase import Atoms, units
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.dataset import Dataset
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.evaluation import prediction
from hpcmlip.evaluation.calculator import EnsembleCalculator
from hpcmlip.evaluation.ensemble import evaluate
from hpcmlip.evaluation.members import Ensemble
from hpcmlip.launch import World
from hpcmlip.models import hipnn
from hpcmlip.training.setup import open_loader

DATA = "{name: boxes, reader: extxyz, sources: [raw.xyz], out: boxes.zarr, split: {by: structure}}"


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """A folder with raw.xyz (boxes and slabs with labels) and data.yaml."""
    folder = tmp_path_factory.mktemp("periodic")
    structures = [atoms for i, pbc in enumerate((True, (True, True, False))) for atoms in boxes.boxes(60, i, pbc=pbc)]
    ase.io.write(folder / "raw.xyz", boxes.labelled(structures), format="extxyz")
    (folder / "data.yaml").write_text(DATA)
    return folder


@pytest.fixture(scope="module")
def experiment(raw, cli, train_member) -> Path:
    """Two members, hardly trained; cutoff 6.5 Å, longer than most cells."""
    cli("shard", raw / "data.yaml", "--workers", 1)
    for seed in range(2):
        train_member(
            raw / "tiny" / f"member_{seed:02d}", raw / "boxes.zarr", seed=seed, steps=3, levels={"reference": "EF"}
        )
    return raw / "tiny"


@pytest.fixture(scope="module")
def calculator(experiment) -> EnsembleCalculator:
    """With random weights three times as large: forces and stress as strong as those of a real system."""
    calculator = EnsembleCalculator(experiment)
    with torch.no_grad():
        for member in calculator.ensemble.members:
            for weight in member.potential.parameters():
                weight.mul_(3 if weight.dim() > 1 else 1)
    return calculator


@pytest.fixture
def box(calculator) -> Atoms:
    atoms = boxes.boxes(3, seed=8)[2]
    atoms.rattle(0.05, seed=0)
    atoms.calc = calculator
    return atoms


def test_forces_and_stress_are_derivatives(box):
    np.testing.assert_allclose(box.get_forces(), calculate_numerical_forces(box, eps=1e-5), atol=2e-6)
    stress = box.get_stress()
    np.testing.assert_allclose(stress, calculate_numerical_stress(box, eps=1e-5), atol=2e-7)
    assert np.abs(stress).max() > 5e-3


def test_forces_of_a_slab_are_derivatives_and_it_has_no_stress(calculator):
    slab = boxes.boxes(1, pbc=(True, False, True))[0]
    slab.calc = calculator
    np.testing.assert_allclose(slab.get_forces(), calculate_numerical_forces(slab, eps=1e-5), atol=2e-6)
    with pytest.raises(PropertyNotImplementedError, match="not periodic in all three directions"):
        slab.get_stress()


def test_molecules_have_no_stress(box):
    box.pbc = False
    assert np.isfinite(box.get_potential_energy())
    with pytest.raises(PropertyNotImplementedError):
        box.get_stress()


def test_a_supercell_is_as_many_cells(box, calculator):
    energy, forces, stress = box.get_potential_energy(), box.get_forces(), box.get_stress()
    for repeat in ((2, 1, 1), (1, 2, 3)):
        large, number = box.repeat(repeat), np.prod(repeat)
        large.calc = calculator
        assert large.get_potential_energy() == pytest.approx(number * energy, rel=1e-12)
        np.testing.assert_allclose(large.get_forces(), np.tile(forces, (number, 1)), atol=1e-9)
        np.testing.assert_allclose(large.get_stress(), stress, atol=1e-11)


def test_the_choice_of_the_cell_and_of_images_does_not_matter(box):
    energy, forces, stress = box.get_potential_energy(), box.get_forces(), box.get_stress()
    box.positions += np.array([[3, -2, 1]]) @ box.cell[:] * (np.arange(len(box)) % 2)[:, None] + 1.7
    box.cell[2] += box.cell[0] - 2 * box.cell[1]
    assert box.get_potential_energy() == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(box.get_forces(), forces, atol=1e-9)
    np.testing.assert_allclose(box.get_stress(), stress, atol=1e-11)


def test_a_wide_cell_is_a_molecule(box):
    molecule = Atoms(box.numbers, box.positions)
    molecule.calc = box.calc
    energy, forces = molecule.get_potential_energy(), molecule.get_forces()
    box.set_cell(3 * box.cell)
    assert box.get_potential_energy() == pytest.approx(energy, rel=1e-12)
    np.testing.assert_allclose(box.get_forces(), forces, atol=1e-10)


def test_cell_relaxation_and_dynamics(box):
    start = box.get_potential_energy()
    BFGS(FrechetCellFilter(box), logfile=None).run(fmax=0.5, steps=5)
    assert box.get_potential_energy() < start
    thermalize_momenta(box, temperature_K=300, rng=np.random.default_rng(0))
    energies = [box.get_total_energy()]
    dynamics = VelocityVerlet(box, 0.2 * units.fs)
    dynamics.attach(lambda: energies.append(box.get_total_energy()))
    dynamics.run(40)
    assert np.ptp(energies) < 0.05 * 1.5 * units.kB * 300 * len(box)


def test_periodic_and_not_in_one_file(experiment, tmp_path):
    calculator = EnsembleCalculator(experiment)
    structures = [atoms for pbc in (True, False, (True, True, False)) for atoms in boxes.boxes(4, pbc=pbc)]
    structures = [structures[i] for i in np.random.default_rng(0).permutation(len(structures))]
    structures[3].info["stress"] = np.eye(3)
    ase.io.write(tmp_path / "in.xyz", structures)
    prediction.predict([experiment], tmp_path / "in.xyz", tmp_path / "out.xyz")
    results = ase.io.read(tmp_path / "out.xyz", index=":")
    assert len(results) == 12
    for atoms, said in zip(ase.io.read(tmp_path / "in.xyz", index=":"), results, strict=True):
        atoms.calc = calculator
        assert said.pbc.tolist() == atoms.pbc.tolist()
        np.testing.assert_allclose(said.cell, atoms.cell, atol=1e-7)
        assert said.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-8)
        np.testing.assert_allclose(said.get_forces(), atoms.get_forces(), atol=1e-7)
        assert ("stress" in said.calc.results) == bool(atoms.pbc.all())
        if atoms.pbc.all():
            np.testing.assert_allclose(said.get_stress(), atoms.get_stress(), atol=1e-7)


def _no_volume() -> Atoms:
    atoms = boxes.boxes(1)[0]
    atoms.cell[1] = 2 * atoms.cell[0]
    return atoms


def test_a_cell_without_volume_is_refused(experiment, calculator, tmp_path):
    ase.io.write(tmp_path / "in.traj", [boxes.boxes(1)[0], _no_volume()])
    with pytest.raises(DataError, match=r"structure 1 is periodic, but its cell .* has no volume"):
        prediction.predict([experiment], tmp_path / "in.traj", tmp_path / "out.xyz")
    atoms = _no_volume()
    atoms.calc = calculator
    with pytest.raises(DataError, match="the structure is periodic, but"):
        atoms.get_potential_energy()


def test_models_of_molecules_only_refuse_them(experiment, raw, tmp_path, monkeypatch):
    monkeypatch.setattr(hipnn.Config, "limits", property(lambda self: {"periodic": "for this test"}))
    ase.io.write(tmp_path / "in.xyz", [boxes.boxes(1, pbc=False)[0], boxes.boxes(1)[0]])
    with pytest.raises(DataError, match=r"structure 1 \(pbc T T T; .*\) is periodic, which model 'hipnn' .*this test"):
        prediction.predict([experiment], tmp_path / "in.xyz", tmp_path / "out.xyz")
    with pytest.raises(DataError, match=r"the store .*boxes.zarr is periodic, which model 'hipnn' .*this test"):
        evaluate([experiment], raw / "boxes.zarr", split="test", out=tmp_path / "evaluation", unit="kcal/mol")
    values = {"name": "x", "data": {"stores": [str(raw / "boxes.zarr")], "levels": {"reference": "EF"}}}
    config = from_values(RunConfig, values | {"model": {"kind": "hipnn"}}, tmp_path, where="test")
    dataset = Dataset.open(config.data.stores, config.data.levels)
    with pytest.raises(ConfigError, match=r"data.stores hold periodic structures, which model 'hipnn' .*this test"):
        open_loader(config, dataset, World())


def test_models_without_a_potential_give_no_stress(experiment, box, tmp_path, monkeypatch):
    monkeypatch.setattr(Ensemble, "is_conservative", False)
    box.calc = EnsembleCalculator(experiment)
    assert np.isfinite(box.get_forces()).all()
    with pytest.raises(PropertyNotImplementedError, match="no gradient of its energy"):
        box.get_stress()


def test_the_whole_way_by_command_line(raw, cli, tmp_path):
    """The same bytes from two workers; two epochs; evaluation; prediction."""
    for workers in (1, 2):
        cli("shard", raw / "data.yaml", f"out={tmp_path}/{workers}.zarr", "--workers", workers)
    manifests = [json.loads((tmp_path / f"{n}.zarr" / "manifest.json").read_text()) for n in (1, 2)]
    assert manifests[0] == manifests[1]
    cli("verify", tmp_path / "1.zarr")
    assert "periodic structures" in cli("inspect", tmp_path / "1.zarr").stdout
    values = {
        "name": "boxes",
        "data": {"stores": [str(tmp_path / "1.zarr")], "levels": {"reference": "EF"}, "pairs_per_batch": 8000},
        "model": {"kind": "hipnn", "lmax": 1, "features": 8, "interactions": 1, "cutoff": 5.0, "soft_max": 4.0},
        "train": {"epochs": 2},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    cli("train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", cwd=tmp_path)
    out = tmp_path / "evaluation"
    cli("evaluate", tmp_path / "run", "--data", tmp_path / "1.zarr", "--out", out)
    found = json.loads((out / "metrics.json").read_text())["levels"]["reference"]
    assert found["energy"]["count"] > 5 and np.isfinite(found["forces"]["rmse"])
    held_out = sum(group["z"].shape[0] for _, group in zarr.open_group(out / "predictions.zarr", mode="r").groups())
    assert held_out == found["energy"]["count"]
    ase.io.write(tmp_path / "in.xyz", boxes.boxes(5, seed=4))
    cli("predict", tmp_path / "run", tmp_path / "in.xyz", "-o", tmp_path / "out.xyz")
    for said in ase.io.read(tmp_path / "out.xyz", index=":"):
        assert np.isfinite(said.get_potential_energy()) and said.get_stress().shape == (6,)


def test_molecules_beyond_the_dense_form(experiment):
    """More than 64 atoms in neighbour lists: molecules far from each other are as many molecules."""
    calculator = EnsembleCalculator(experiment)
    methane = boxes.boxes(1, pbc=False)[0]
    methane.calc = calculator
    cluster = Atoms()
    for step in range(14):
        moved = methane.copy()
        moved.translate([20.0 * step, 0, 0])
        cluster += moved
    cluster.calc = calculator
    assert len(cluster) == 70
    assert cluster.get_potential_energy() == pytest.approx(14 * methane.get_potential_energy(), rel=1e-12)
    np.testing.assert_allclose(cluster.get_forces(), np.tile(methane.get_forces(), (14, 1)), atol=1e-10)
