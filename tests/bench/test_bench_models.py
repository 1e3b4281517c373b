"""`hpcmlip bench models`: every preset can be timed, programs take turns, peers answer from another Python."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hpcmlip import plugins
from hpcmlip.bench import models, peer_process, stepping
from hpcmlip.bench.peer_process import PeerProcess
from hpcmlip.errors import ConfigError, RunError

FAKE_PEER = """
import json, sys
given = json.loads(sys.stdin.readline())
print(json.dumps({"parameters": len(given["species"]), "version": sys.argv[1]}), flush=True)
for line in sys.stdin:
    if int(line) > 2:
        break
    print(json.dumps({"seconds": 0.5 * int(line), "bytes": 100}), flush=True)
"""


@pytest.fixture
def fake_peer(tmp_path, monkeypatch):
    script = tmp_path / "peers.py"
    script.write_text(FAKE_PEER)
    monkeypatch.setattr(peer_process.peers, "__file__", str(script))
    numbers, pos = stepping.molecules(None, 9, 3)
    process = PeerProcess(sys.executable, "torchani", numbers, pos, 1, "cpu")
    yield process
    process.close()


@pytest.mark.parametrize("kind", plugins.names("models"))
def test_every_preset_has_a_step_that_reaches_its_weights(kind):
    numbers, pos = stepping.molecules(None, 5, 2)
    potential = models._potential(kind)
    energy, forces = stepping.potential_step(potential, numbers, pos, "cpu")()
    assert energy.shape == (2,) and forces.shape == (10, 3)
    assert torch.isfinite(energy).all() and torch.isfinite(forces).all()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in potential.parameters())


def test_programs_take_turns_and_the_first_turn_does_not_count():
    calls = []
    seconds = stepping.take_turns({n: lambda n=n: calls.append(n) or float(len(calls)) for n in "ab"}, 2)
    assert calls == list("ababab") and seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert stepping.ratio([2.0, 4.0, 6.0], [1.0, 1.0, 1.0]) == (4.0, [2.0, 6.0])


def test_a_peer_answers_through_its_pipe(fake_peer):
    assert (fake_peer.parameters, fake_peer.version) == (3, "torchani")
    assert (fake_peer.step(2), fake_peer.bytes) == (1.0, 100)
    program = models.Program(fake_peer, fake_peer.parameters, count=2)
    row = models._row(program, {"torchani": [1.0, 1.0], "hippynn": [8.0, 8.0]}, reference_count=4)
    assert row["structures_per_s"] == 2.0 and row["times_hippynn"] == 4.0
    with pytest.raises(RunError, match="torchani gave no answer"):
        fake_peer.step(3)


@pytest.mark.parametrize(("seconds", "count"), [(0.01, 64), (1.0, 4), (100.0, 2)])
def test_slow_programs_get_fewer_molecules(seconds, count):
    program = models.Program(SimpleNamespace(step=lambda n: n * seconds), 1)
    assert models._affordable(program, 64) == count


def test_a_python_without_the_peer_is_refused():
    numbers, pos = np.ones((1, 2), dtype=np.int64), np.zeros((1, 2, 3))
    with pytest.raises(ConfigError, match=r"has no egnn-pytorch .*install it there"):
        PeerProcess(sys.executable, "egnn-pytorch", numbers, pos, 1, "cpu")
    with pytest.raises(ConfigError, match="does not start"):
        PeerProcess("/nowhere/python", "torchani", numbers, pos, 1, "cpu")


def test_hippynn_and_a_model_are_timed_and_weighed(tmp_path, capsys):
    pytest.importorskip("hippynn", reason="hippynn 0.1.3 is not installed")
    threads = torch.get_num_threads()
    small = ["--molecules=2", "--repeats=1", "--trials=1", "--kernels", "_pytorch_raw", "--threads=1"]
    try:
        with torch.random.fork_rng(devices=[]):
            assert models.main(["hipnn", *small, "--out", str(tmp_path / "o/models.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "o/models.json").read_text())
    assert [row["program"] for row in result["rows"]] == ["hippynn", "hipnn"]
    assert all(row["structures_per_s"] > 0 and row["mb_per_structure"] > 0 for row in result["rows"])
    assert result["rows"][0]["parameters"] == result["rows"][1]["parameters"]
