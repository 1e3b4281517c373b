"""Alone or together the same; no compiler needed; launch mistakes end in one sentence before anything is written."""

import json

import pytest
from runs import RunDir

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]


def test_alone_agrees_with_two_ranks_and_builds_nothing(write_run, cli, mpirun, tmp_path):
    config = write_run(tmp_path, train={"epochs": 1})
    extensions = tmp_path / "extensions"
    cli("train", config, "--run-dir", tmp_path / "one", env={"TORCH_EXTENSIONS_DIR": extensions})
    assert not extensions.exists(), "DeepSpeed compiled an operator"
    ended = mpirun(2, "train", config, "--run-dir", tmp_path / "two")
    assert ended.returncode == 0, ended.output
    one, two = RunDir(tmp_path / "one"), RunDir(tmp_path / "two")
    expected = [line["loss"] for line in one.metrics("train")]
    assert [line["loss"] for line in two.metrics("train")] == pytest.approx(expected, rel=1e-6)
    objective = one.metrics("validation")[-1]["objective"]
    assert two.metrics("validation")[-1]["objective"] == pytest.approx(objective, rel=1e-6)
    record = json.loads((tmp_path / "two" / "done.json").read_text())
    assert record["state"] == "finished" and record["weights_sha256"] == two.model_hash()
    assert not list((tmp_path / "two").glob(".rendezvous*"))


@pytest.mark.parametrize(
    ("env", "overrides", "code", "reason"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, [], 1, "srun hpcmlip train"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, [], 1, "PMI_SIZE=4"),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "3"}, [], 2, "cannot share"),
        ({}, ["engine.device=cuda"], 1, "torch finds no GPU"),
        ({}, ["loss.weights.dz.energy=0.0", "data.levels={dzz: E}", "loss.weights={}"], 2, "dzz"),
    ],
)
def test_mistakes_end_in_a_sentence(write_run, cli, tmp_path, env, overrides, code, reason):
    config = write_run(tmp_path)
    run_dir = tmp_path / "run"
    arguments = ["train", config, *overrides, "--run-dir", run_dir]
    ended = cli(*arguments, expect=code, env={"CUDA_VISIBLE_DEVICES": ""} | env)
    assert reason in ended.stderr and "Traceback" not in ended.stderr
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "model.json").exists()


def test_a_stop_file_stops_before_the_first_step_and_is_removed(write_run, cli, tmp_path):
    config, run_dir = write_run(tmp_path, train={"epochs": 1}), tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "STOP").touch()
    ended = cli("train", config, "--run-dir", run_dir, expect=75)
    assert "stopped on request (the file STOP) before the first step" in ended.stderr
    assert not RunDir(run_dir).steps() and not (run_dir / "STOP").exists() and not (run_dir / "stacks").exists()
    assert cli("train", config, "--run-dir", run_dir).returncode == 0
    steps = [line["step"] for line in RunDir(run_dir).metrics("train")]
    assert steps == list(range(1, len(steps) + 1)) and (run_dir / "done.json").exists()
