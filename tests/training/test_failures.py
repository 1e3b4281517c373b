"""A run that cannot go on says why, on the terminal and in its own log."""

import pytest

from hpcmlip.config import dump
from hpcmlip.errors import DataError
from hpcmlip.training.loop import train
from hpcmlip.training.stopping import Signals


def test_the_reason_stands_in_the_log(make_config, run_values, tmp_path):
    gone = run_values["data"] | {"stores": [str(tmp_path / "gone.zarr")]}
    with pytest.raises(DataError, match="there is no store"):
        train(make_config(data=gone), tmp_path / "run", Signals())
    last = (tmp_path / "run" / "log.txt").read_text().splitlines()[-1]
    assert " ERROR " in last and "there is no store" in last


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_run_directory_that_cannot_be_made(make_config, cli, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "run.yaml").write_text(dump(make_config()))
    for command in (["train"], ["submit", "--local"]):
        said = cli(command[0], tmp_path / "run.yaml", "--run-dir", tmp_path / place, *command[1:], expect=2).stderr
        assert "--run-dir" in said.splitlines()[-1] and "Traceback" not in said


def test_diverged_weights_are_not_blamed_on_the_data(make_config, cli, tmp_path):
    config = make_config(optim={"lr": 1e25}, train={"epochs": 1, "max_bad_steps": 0})
    (tmp_path / "run.yaml").write_text(dump(config))
    said = cli("train", tmp_path / "run.yaml", "--run-dir", tmp_path / "run", expect=1).stderr
    assert "lower optim.lr or set optim.clip_norm" in said.splitlines()[-1]
