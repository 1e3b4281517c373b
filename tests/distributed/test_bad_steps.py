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


@pytest.fixture
def reports(ab_initio_store, launch, tmp_path, run_values):
    """`reports(stages, rank=..., ...)` -> stage -> what both ranks saw of a bad label on one; see the worker."""

    def run(stages, **case) -> dict[int, list[dict]]:
        (tmp_path / "case.json").write_text(json.dumps({"config": run_values, "stages": stages, **case}))
        launch(WORKER, tmp_path / "case.json", ab_initio_store, tmp_path, ranks=2)
        files = {stage: [tmp_path / f"stage{stage}.rank{rank}.json" for rank in (0, 1)] for stage in stages}
        return {stage: [json.loads(path.read_text()) for path in paths] for stage, paths in files.items()}

    return run


def check(both: list[dict], bad: int) -> None:
    for report in both:
        assert report["finite"] and report["same_on_ranks"] and report["flags"] == [2.0]
        assert report["applied"] == [True, False, False, True]
        assert report["unchanged"] == [False, True, True, False]
        # their gradients are compared by tests/reliability/test_engine_gradients.py
        assert report["forces_equal"]
    assert both[bad]["sources"] == [both[bad]["injected"]] and both[1 - bad]["sources"] == []


@pytest.mark.fault("R10", sample=1, soak=10)
def test_a_bad_label_on_one_rank_changes_nothing_on_any(reports, draw):
    case = {
        "rank": draw.rng.randrange(2),
        "micro_batch": draw.rng.randrange(2),
        "value": draw.rng.choice(["inf", "-inf"]),  # NaN is how a label is absent
        "property": draw.rng.choice(["energy", "forces"]),
        # mae: the gradient of an infinite error is finite
        "loss": draw.rng.choice(["rmse_mae", "mae", "mse"]),
    }
    print(case)
    for both in reports([0, 1, 2], **case, unchecked=False).values():
        check(both, case["rank"])


@pytest.mark.control("R10", broken="no look at whether sums and gradients are finite")
def test_without_the_check_weights_become_nan(reports):
    (both,) = reports(
        [0], rank=1, micro_batch=1, value="inf", property="energy", loss="rmse_mae", unchecked=True
    ).values()
    assert not both[0]["finite"] and not both[1]["finite"]
    with pytest.raises(AssertionError):
        check(both, 1)


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


@pytest.mark.fault("R10", sample=1, soak=1)
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
