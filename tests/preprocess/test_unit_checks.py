"""Files in other units than the reader's, or with gradients for forces, are noticed without any metadata."""

import numpy as np
import pytest
import raw_files
from edits import change, everywhere
from in_process import shard

from hpcmlip import configs
from hpcmlip.config import load
from hpcmlip.errors import DataError
from hpcmlip.preprocess import consistency
from hpcmlip.preprocess.checks import judge
from hpcmlip.preprocess.config import DataConfig
from hpcmlip.preprocess.job import make

UNKNOWN = "levels={x: {energy: energies, forces: forces}}"
"""Isolated atoms are not known."""


@pytest.fixture
def comp6(tmp_path):
    path = raw_files.write_comp6(tmp_path / "raw.h5", rows=60)
    return path, raw_files.write_config(tmp_path, "raw.h5", "comp6", split={"by": "structure"})


def sums(name: str, *overrides: str) -> tuple:
    """(job, sums) of a sample of the package: real molecules."""
    job = make(load(DataConfig, configs.path(name), overrides))
    meter = consistency.Meter(job)
    with job.open(0) as file:
        for group in file.groups():
            rows = file.read(group, 0, group.rows)
            verdict = judge(rows, job)
            meter.add(rows, verdict.labels > 0, verdict.bonds)
    return job, meter.sums


@pytest.mark.parametrize(("name", "hydrogen"), [("ab_initio_small", -16.7), ("xtb_tiny", -14.4)])
def test_real_molecules_look_right(name, hydrogen, caplog):
    keys = {"ab_initio_small": "wb97x_dz", "xtb_tiny": "gfn1_xtb"}
    level = f"levels={{x: {{energy: {keys[name]}.energy, forces: {keys[name]}.forces}}}}"
    job, found = sums(f"data/{name}.yaml", level)
    assert consistency._fitted_hydrogen(job, found.fit(0)) == pytest.approx(hydrogen, abs=1)
    assert found.bonds[1] / found.bonds[0] == pytest.approx(1, abs=0.05)
    consistency.check(job, found)
    consistency.check(*sums(f"data/{name}.yaml"))
    assert not caplog.text


@pytest.mark.parametrize("factor", [27.2114, 627.5])
def test_real_energies_in_another_unit_are_refused(factor):
    """Isolated atoms known or not."""
    job, found = sums("data/ab_initio_small.yaml", "levels={x: {energy: wb97x_dz.energy}}")
    wrong = consistency.Sums(**(vars(found) | {"atb": found.atb * factor, "btb": found.btb * factor**2}))
    with pytest.raises(DataError, match=r"give an H atom -.* eV by least squares"):
        consistency.check(job, wrong)
    low = consistency.Sums(**(vars(found) | {"atb": found.atb / factor, "btb": found.btb / factor**2}))
    assert any("check the unit" in text for text in consistency._odd(job, low))


def test_what_looks_wrong_passes_when_told_to(comp6, caplog):
    path, config = comp6
    change(path, everywhere("energies", lambda e: e * 27.2114))
    with pytest.raises(DataError, match="'check_units: false' lets it pass"):
        shard(config)
    store = shard(config, "check_units=false")
    assert "eV an atom away from the isolated atoms" in caplog.text and store.meta.num_structures == 240


def test_forces_that_do_not_quite_fit_are_told(comp6, caplog):
    path, config = comp6
    change(path, everywhere("forces", lambda f: f * np.float32(0.66)))
    shard(config)
    assert "-ΔE is 1.5" in caplog.text and "check the units of forces and coordinates" in caplog.text
    shard(config, UNKNOWN, f"out={path.parent / 'unknown.zarr'}")
    assert caplog.text.count("check the units of forces and coordinates") == 2


@pytest.mark.parametrize("factor", [627.5, 27.2114, 0.529177])
def test_real_forces_in_another_unit_are_refused(factor):
    job, found = sums("data/ab_initio_small.yaml")
    # pairs of conformations: number, Σab, Σa², Σb² of a = -ΔE and b = F·ΔR
    wrong = consistency.Sums(**(vars(found) | {"work": found.work * [1, factor, 1, factor**2]}))
    with pytest.raises(DataError, match=r"-ΔE is [0-9.]+ times F·ΔR at level 'dz'.*do not belong together"):
        consistency.check(job, wrong)


def test_sums_survive_their_way_through_a_receipt():
    _, whole = sums("data/ab_initio_small.yaml", "levels={x: {energy: wb97x_dz.energy, forces: wb97x_dz.forces}}")
    again = consistency.Sums.from_json((whole + consistency.Sums.zeros(1, 4)).as_json())
    assert all((getattr(again, name) == values).all() for name, values in vars(whole).items())
