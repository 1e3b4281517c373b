"""The benchmark compares equal things, and says so when they are not."""

import json

import pytest
import torch

from hpcmlip.bench import hipnn as bench
from hpcmlip.errors import DataError

pytest.importorskip("hippynn", reason="hippynn 0.1.3 is not installed")

SMALL = ["--features=6", "--molecules=3", "--repeats=1", "--trials=1", "--kernels", "_pytorch_raw", "--threads=1"]


@pytest.fixture(autouse=True)
def same_state_afterwards():
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def test_both_agree_and_are_timed(capsys):
    assert bench.main(SMALL) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert max(result["relative_difference_float64"].values()) < 1e-11
    assert result["milliseconds"].keys() == {"hippynn", "hpcmlip"} and result["ratio"]["hpcmlip"][0] > 0


def test_other_weights_are_noticed(monkeypatch, capsys):
    load = bench.load_hippynn_state

    def wrong(net, network, heads):
        load(net, {name: x * 1.001 if name.endswith("selfint.weight") else x for name, x in network.items()}, heads)

    monkeypatch.setattr(bench, "load_hippynn_state", wrong)
    assert bench.main(SMALL) == 1
    assert "do not agree" in capsys.readouterr().out


def test_a_size_that_is_not_there():
    with pytest.raises(DataError, match="no molecule of 99 atoms"):
        bench.main([*SMALL, "--atoms=99"])
