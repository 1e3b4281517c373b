"""Non-finite numbers: skipped on all ranks together, named, and the end of the run after a set number."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from runs import RunDir

from hpcmlip.data import store as stores

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WORKER = Path(__file__).with_name("bad_step_worker.py")


@pytest.fixture(scope="module")
def reports(ab_initio_store, launch, tmp_path_factory, run_values):
    out = tmp_path_factory.mktemp("bad")
    (out / "config.json").write_text(json.dumps(run_values))
    launch(WORKER, out / "config.json", ab_initio_store, out, ranks=2)
    return lambda stage, rank: json.loads((out / f"stage{stage}.rank{rank}.json").read_text())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_bad_step_on_one_rank_changes_nothing_on_any(reports, stage):
    for rank in (0, 1):
        report = reports(stage, rank)
        assert report["applied"] == [True, False, False, True]
        assert report["unchanged"] == [False, True, True, False]
        assert report["finite"] and report["same_on_ranks"] and report["flags"] == [2.0]
    assert reports(stage, 0)["sources"] == []
    assert reports(stage, 1)["sources"] == [reports(stage, 1)["injected"]]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_forces_inside_the_engine_are_those_of_plain_torch(reports, stage):
    # their gradients are compared by test_equal_steps.py
    assert reports(stage, 0)["forces_equal"] and reports(stage, 1)["forces_equal"]


@pytest.fixture(scope="module")
def store_with_infinity(ab_initio_store, tmp_path_factory):
    """(store in which one training label is infinite, how a message names that structure)."""
    path = tmp_path_factory.mktemp("infinite") / "store.zarr"
    shutil.copytree(ab_initio_store, path)
    meta = stores.open_store(path).meta
    group = max(meta.groups, key=lambda g: g.rows)
    row = next(s.start for s in group.segments if s.split == "train")
    root = zarr.open_group(path, mode="r+", use_consolidated=False)
    values = root[f"{group.path}/energy"][:]
    values[row, 0] = np.inf
    root[f"{group.path}/energy"][:] = values
    manifest = stores.read_manifest(path)
    for name in manifest["files"]:
        content = (path / name).read_bytes()
        manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["digest"] = stores.manifest_digest(manifest["files"])
    (path / stores.MANIFEST).write_text(json.dumps(manifest))
    file, ordinal, source_row = (int(i) for i in root[f"{group.path}/source"][row])
    return path, f"{meta.sources[file].name}, group {ordinal}, row {source_row}"


def test_the_run_names_the_structure_and_ends_after_the_set_number(store_with_infinity, write_run, launch, tmp_path):
    path, name = store_with_infinity
    config = write_run(tmp_path, store=path, train={"epochs": 9, "max_bad_steps": 1})
    ended = launch("-m", "hpcmlip", "train", config, "--run-dir", tmp_path / "run", expect=1)
    run_dir = RunDir(tmp_path / "run")
    assert [line["sources"] for line in run_dir.metrics("bad_step")] == [[name], [name]]
    assert run_dir.metrics("bad_step")[0]["epoch"] == 0 and run_dir.metrics("bad_step")[1]["epoch"] == 1
    assert "2 steps had non-finite numbers" in ended.stderr and name in ended.stderr
    assert "training/loop.py" not in ended.stderr, "a traceback of ours"
    assert f"skipped on all ranks, non-finite numbers (1 so far): {name}" in run_dir.log()
    assert not (tmp_path / "run" / "done.json").exists()
