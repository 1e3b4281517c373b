"""R19: what another version of hpcmlip wrote is read, or refused with what to do."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml

from hpcmlip.cluster.experiment import SCHEMA as EXPERIMENT_SCHEMA
from hpcmlip.cluster.experiment import open_experiment
from hpcmlip.data import store as stores
from hpcmlip.errors import UserError
from hpcmlip.evaluation.prediction import predict
from hpcmlip.models import card, export
from hpcmlip.sealing import seal, unseal
from hpcmlip.training import checkpoint, rundir

STORED = Path(__file__).with_name("stored")
OLDER = "schema1"
PRESENT = STORED / f"schema{card.SCHEMA}"


@pytest.fixture
def run(tmp_path) -> Path:
    """A run in the present format."""
    shutil.copytree(PRESENT, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.fault("R19", sample=1, soak=1)
def test_the_stored_model_says_what_it_said(tmp_path):
    predict([PRESENT], STORED / "water.xyz", tmp_path / "out.xyz")
    found, expected = (ase.io.read(path) for path in (tmp_path / "out.xyz", PRESENT / "water.xyz"))
    assert found.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-6)
    np.testing.assert_allclose(found.get_forces(), expected.get_forces(), atol=1e-6)
    assert found.info["level"] == expected.info["level"] == "cc"


@pytest.mark.fault("R19", sample=1, soak=1)
def test_the_stored_checkpoint_is_read():
    found = checkpoint.newest(PRESENT / "checkpoints")
    progress, done = found.state["progress"], rundir.finished(PRESENT)
    assert progress["step"] == done["step"] == found.state["step"] > 0
    assert {"master", "exp_avg", "exp_avg_sq"} == found.tensors.keys()
    assert all(group.keys() == found.tensors["master"].keys() for group in found.tensors.values())


def newer(path: Path, schema: int) -> None:
    """The same record as a later version may write it, soundly."""
    values = unseal(path.read_bytes(), schema)
    path.write_text(seal(values | {"schema": schema + 1, "new": True}, schema + 1))


def newer_store(run: Path, store: Path) -> None:
    path = store / "zarr.json"
    values = json.loads(path.read_text())
    values["attributes"]["hpcmlip"]["schema"] = stores.SCHEMA + 1
    path.write_text(json.dumps(values))
    manifest = stores.read_manifest(store)
    manifest["files"]["zarr.json"] = {
        "size": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    (store / stores.MANIFEST).write_text(json.dumps(manifest | {"digest": stores.manifest_digest(manifest["files"])}))


def experiment(schema: int) -> Callable:
    def make(run: Path, store: Path) -> None:
        (run / "run.yaml").write_text(yaml.safe_dump({}))
        (run / "experiment.json").write_text(json.dumps({"schema": schema, "members": [], "evaluate": None}))

    return make


def newer_checkpoint(run: Path, store: Path) -> None:
    """An older one of the present version lies beside it: going on from that would throw work away."""
    folder = run / "checkpoints"
    step = checkpoint.steps(folder)[-1]
    shutil.copytree(folder / checkpoint.name(step), folder / checkpoint.name(step + 1))
    newer(folder / checkpoint.name(step + 1) / checkpoint.MANIFEST, checkpoint.SCHEMA)


def older(run: Path, store: Path) -> None:
    shutil.rmtree(run)
    shutil.copytree(STORED / OLDER, run)


READ = {
    "model": lambda run, store: export.load_model(run),
    "checkpoint": lambda run, store: checkpoint.newest(run / "checkpoints"),
    "end": lambda run, store: rundir.finished(run),
    "experiment": lambda run, store: open_experiment(run),
    "store": lambda run, store: stores.open_store(store),
}
CASES = {
    "newer model": ("model", lambda run, store: newer(run / card.CARD, card.SCHEMA), "upgrade hpcmlip"),
    "older model": ("model", older, r"schema 1.*use it with the hpcmlip that made it, or train it again"),
    "newer checkpoint": ("checkpoint", newer_checkpoint, "upgrade hpcmlip"),
    "older checkpoint": ("checkpoint", older, r"schema 1.*finish the run with the hpcmlip that began it"),
    "newer record of the end": ("end", lambda run, store: newer(run / rundir.DONE, rundir.SCHEMA), "upgrade hpcmlip"),
    "newer experiment": ("experiment", experiment(EXPERIMENT_SCHEMA + 1), "upgrade hpcmlip"),
    "older experiment": ("experiment", experiment(EXPERIMENT_SCHEMA - 1), "with another --run-dir"),
    "newer store": ("store", newer_store, "upgrade hpcmlip"),
}
"""Fault -> (what is read, what lies there, what the user is told)."""


def check(case: str, run: Path, store: Path) -> None:
    what, make, says = CASES[case]
    make(run, store)
    with pytest.raises(UserError, match=says) as refused:
        READ[what](run, store)
    assert refused.value.exit_code == 1


@pytest.fixture
def store(ab_initio_store, tmp_path) -> Path:
    shutil.copytree(ab_initio_store, tmp_path / "store.zarr")
    return tmp_path / "store.zarr"


@pytest.mark.fault("R19", sample=1, soak=1)
@pytest.mark.parametrize("case", CASES)
def test_another_version_is_refused_with_what_to_do(run, store, case):
    check(case, run, store)


@pytest.mark.control("R19", broken="the schema number is not looked at")
@pytest.mark.parametrize(("module", "case"), [(card, "newer model"), (checkpoint, "newer checkpoint")])
def test_without_the_number_the_check_fails(run, store, monkeypatch, module, case):
    monkeypatch.setattr(module, "unseal", lambda text, schema: unseal(text, json.loads(text)["schema"]))
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        check(case, run, store)
