"""From `hpcmlip train` to `hpcmlip evaluate`: what training wrote is what evaluation reads."""

import json

import pytest
import yaml

from hpcmlip.evaluation import table


@pytest.mark.distributed
def test_evaluation_of_the_validation_split_repeats_the_best_validation(ab_initio_store, tmp_path, cli):
    run = {
        "name": "short",
        "data": {"stores": [str(ab_initio_store)], "levels": {"dz": "EF", "cc": "E"}, "pairs_per_batch": 8000},
        "model": {"kind": "hipnn", "lmax": 1, "features": 8, "interactions": 1, "cutoff": 6.5},
        "train": {"epochs": 3, "seed": 3},
        "engine": {"device": "cpu"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    cli("train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run")
    shown = cli("evaluate", tmp_path / "run", "--data", ab_initio_store, "--split", "val", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (best,) = [r for r in records if r["kind"] == "validation" and r["step"] == found["members"][0]["best"]["step"]]
    for level, prop in (("dz", "energy"), ("dz", "forces"), ("cc", "energy")):
        wanted, own = best["levels"][level][prop], found["levels"][level][prop]
        # training validates in float32
        assert own["rmse"] == pytest.approx(wanted["rmse"], rel=1e-4)
        assert own["mae"] == pytest.approx(wanted["mae"], rel=1e-4)
        assert (own["count"], own["unit"]) == (wanted["count"], wanted["unit"])
        assert table.number(own["rmse"]) in shown.stdout
    assert found["members"][0]["seed"] == 3
    assert (tmp_path / "out" / "plots" / "learning_curves.png").is_file()
    assert "one member, hence no interval" in shown.stdout
    assert "Split by structure" in shown.stdout
