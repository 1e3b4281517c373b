"""`predict` and the ASE calculator: equal to each other and to `evaluate`, derivatives, dynamics, bad structures."""

import logging

import ase.io
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.fd import calculate_numerical_forces
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from hpcmlip.data.store import open_store
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.evaluation import prediction, predictions
from hpcmlip.evaluation.calculator import EnsembleCalculator


@pytest.fixture(scope="module")
def calculator(experiment) -> EnsembleCalculator:
    return EnsembleCalculator(experiment)


@pytest.fixture(scope="module")
def held_out(ab_initio_store) -> dict[tuple, Atoms]:
    """Source -> structure, some of the test split."""
    store, found = open_store(ab_initio_store), {}
    for meta in store.meta.groups:
        for s in meta.segments:
            if s.split == "test":
                stop = min(s.stop, s.start + 4)
                z, pos, source = (store.read(meta, name, s.start, stop) for name in ("z", "pos", "source"))
                found |= {tuple(map(int, k)): Atoms(n, x) for k, n, x in zip(source, z, pos, strict=True)}
    return found


def test_predict_equals_calculator_equals_evaluate(experiment, evaluated, held_out, calculator, tmp_path):
    ase.io.write(tmp_path / "in.traj", list(held_out.values()))
    prediction.predict([experiment], tmp_path / "in.traj", tmp_path / "out.xyz", level="dz")
    results = ase.io.read(tmp_path / "out.xyz", index=":")
    assert len(results) == len(held_out) > 10
    rows = {}
    for _, group in predictions.groups(evaluated / "predictions.zarr"):
        names = ("energy_mean", "energy_std", "forces_mean", "forces_std")
        values = [group["source"][:].tolist(), *(group[name][:] for name in names)]
        rows |= {tuple(source): rest for source, *rest in zip(*values, strict=True)}
    dz = EnsembleCalculator([experiment], level="dz")
    for source, said in zip(held_out, results, strict=True):
        energy, energy_std, forces, forces_std = rows[source]
        assert said.info["level"] == "dz"
        assert said.get_potential_energy() == pytest.approx(energy[0], abs=1e-8)
        assert said.info["energy_std"] == pytest.approx(energy_std[0], abs=1e-8)
        np.testing.assert_allclose(said.get_forces(), forces[:, 0], atol=2e-6)  # float32 there, 8 decimals here
        np.testing.assert_allclose(said.arrays["forces_std"], forces_std[:, 0], atol=2e-6)
        atoms = held_out[source].copy()
        atoms.calc = dz
        assert atoms.get_potential_energy() == pytest.approx(said.get_potential_energy(), abs=1e-8)
        np.testing.assert_allclose(atoms.get_forces(), said.get_forces(), atol=1e-7)
        assert atoms.calc.results["energy_std"] == pytest.approx(said.info["energy_std"], abs=1e-8)
        np.testing.assert_allclose(atoms.calc.results["forces_std"], said.arrays["forces_std"], atol=1e-7)


def test_the_default_level_is_the_last_of_the_config(calculator):
    assert calculator.level == "cc"


def test_energy_is_the_mean_over_members_and_the_total(experiment, calculator):
    water = molecule("H2O")
    alone = []
    for run in sorted(experiment.iterdir()):
        water.calc = EnsembleCalculator(run)
        alone.append(water.get_potential_energy())
        assert "energy_std" not in water.calc.results
    water.calc = calculator
    assert water.get_potential_energy() == pytest.approx(np.mean(alone), abs=1e-9)
    assert water.get_potential_energy(force_consistent=True) == water.get_potential_energy()
    assert water.calc.results["energy_std"] == pytest.approx(np.std(alone, ddof=1), rel=1e-9)
    # CCSD(T)/CBS of water, -76.37 Ha, in eV: the reference energies are in
    assert water.get_potential_energy() == pytest.approx(-76.37 * units.Ha, abs=3)


def test_forces_are_the_derivative_of_the_energy(calculator):
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=0)
    atoms.calc = calculator
    numerical = calculate_numerical_forces(atoms, eps=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), numerical, atol=2e-6)


def test_float32_is_near_float64(experiment, calculator):
    atoms = molecule("CH3OH")
    atoms.calc = calculator
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc = EnsembleCalculator(experiment, dtype="float32")
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-3)
    assert atoms.get_potential_energy() != energy


def test_optimization_and_dynamics(calculator):
    atoms = molecule("H2O")
    atoms.calc = calculator
    start = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=30)
    assert atoms.get_potential_energy() <= start
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    energies = [atoms.get_total_energy()]
    dynamics = VelocityVerlet(atoms, 0.2 * units.fs)
    dynamics.attach(lambda: energies.append(atoms.get_total_energy()))
    dynamics.run(60)
    kinetic = 1.5 * units.kB * 300 * len(atoms)
    assert np.ptp(energies) < 0.05 * kinetic
    assert np.ptp(atoms.get_velocities()) > 0


def test_labels_of_a_file_are_kept_under_other_names(experiment, tmp_path, capsys):
    atoms = molecule("NH3")
    atoms.info |= {"energy": 1.0, "energy_std": 2.0, "origin": "mine"}
    atoms.arrays["forces"] = np.ones((4, 3))
    ase.io.write(tmp_path / "in.xyz", [atoms, molecule("H2O")])
    prediction.predict([experiment / "member_00"], tmp_path / "in.xyz", tmp_path / "out.xyz")
    first, second = ase.io.read(tmp_path / "out.xyz", index=":")
    assert first.get_potential_energy() < -1000
    assert (first.info["origin"], first.info["level"]) == ("mine", "cc")
    assert "energy_std" not in first.info and "forces_std" not in first.arrays
    assert np.abs(first.get_forces() - 1).max() > 0.5
    assert first.info["ref_energy"] == 1.0 and np.array_equal(first.arrays["ref_forces"], np.ones((4, 3)))
    assert len(second) == 3 and "ref_energy" not in second.info
    assert "one model, so there is no spread" in capsys.readouterr().out


def test_structures_that_are_no_molecules_are_told(experiment, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hpcmlip"), "propagate", True)
    good, short, bohr = molecule("CH3OH"), molecule("H2"), molecule("CH3OH")
    short.positions *= 0.2
    bohr.positions /= units.Bohr
    boxed = Atoms("H2O", positions=molecule("H2O").positions, cell=[9, 9, 9], pbc=True)
    for structures, told in (
        ([good, molecule("H2O"), boxed], ""),
        ([good, short, bohr], "in 2 structure(s), of which 1"),
    ):
        caplog.clear()
        ase.io.write(tmp_path / "in.xyz", structures)
        prediction.predict([experiment], tmp_path / "in.xyz", tmp_path / "out.xyz")
        assert told in caplog.text and bool(told) == bool(caplog.text)
    chain = Atoms("C100", positions=[[1.4 * i, 0, 0] for i in range(100)])
    assert prediction.bond_ratio(chain) == pytest.approx(prediction.bond_ratio(chain[:2])) == pytest.approx(1.4 / 1.52)


def test_the_structures_are_not_overwritten(experiment, tmp_path):
    ase.io.write(tmp_path / "in.xyz", molecule("H2O"))
    (tmp_path / "link.xyz").symlink_to(tmp_path / "in.xyz")
    with pytest.raises(ConfigError, match="is the file of the structures itself"):
        prediction.predict([experiment], tmp_path / "in.xyz", tmp_path / "link.xyz")


def _not_finite():
    atoms = molecule("H2O")
    atoms.positions[1, 2] = np.nan
    return atoms


def _coincident():
    atoms = molecule("H2O")
    atoms.positions[1] = atoms.positions[2]
    return atoms


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: molecule("CH3Cl"), r"structure 1 holds Cl; the models know H C N O only"),
        (_not_finite, r"structure 1 has coordinates that are not finite"),
        (_coincident, r"structure 1 gives no finite energy"),
        (Atoms, r"structure 1 has no atoms"),
    ],
)
def test_bad_structures_are_refused_and_nothing_is_left(bad, message, experiment, calculator, tmp_path):
    ase.io.write(tmp_path / "in.traj", [molecule("H2O"), bad()])
    (tmp_path / "out.xyz").write_text("earlier")
    with pytest.raises(DataError, match=message):
        prediction.predict([experiment], tmp_path / "in.traj", tmp_path / "out.xyz")
    assert (tmp_path / "out.xyz").read_text() == "earlier"
    assert {p.name for p in tmp_path.iterdir()} == {"in.traj", "out.xyz"}
    atoms = bad()
    atoms.calc = calculator
    with pytest.raises(DataError, match=message.replace("structure 1", "the structure")):
        atoms.get_potential_energy()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"", "is empty"),
        (b"1\n\nH 0 0 0\n3\n\nH 0 0", "cannot read structure 1 of"),
        (b"\x89PNG\r\n\x1a\n", "ASE cannot"),
    ],
)
def test_bad_files_are_refused(content, message, experiment, tmp_path):
    path = tmp_path / "in.xyz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        prediction.predict([experiment], path, tmp_path / "out.xyz")
    assert not (tmp_path / "out.xyz").exists()


def test_an_unknown_level_is_refused(experiment):
    with pytest.raises(ConfigError, match=r"no level 'ccc'.*did you mean 'cc'"):
        EnsembleCalculator(experiment, level="ccc")


def test_command_line(experiment, tmp_path, cli):
    ase.io.write(tmp_path / "in.xyz", molecule("H2O"))
    done = cli("predict", experiment, tmp_path / "in.xyz", "-o", tmp_path / "out.xyz", "--level", "dz")
    assert "1 structures at level dz with 3 models" in done.stdout.replace("\n", " ")
    assert "largest" in done.stdout and "(structure 0)" in done.stdout
    failed = cli("predict", experiment, tmp_path / "absent.xyz", "-o", tmp_path / "out2.xyz", expect=1)
    assert "there is no file" in failed.stderr and "Traceback" not in failed.stderr
