"""`hpcmlip bench step`: ours and plain torch train the same weights, on one rank and on two, before they are timed."""

import json
from types import SimpleNamespace

import pytest

from hpcmlip.bench import step as bench

SMALL = ["data.pairs_per_batch=600", "model.features=6", "model.lmax=1", "model.interactions=1"]


@pytest.mark.distributed
def test_both_train_the_same_weights_and_are_timed(xtb_store, capsys):
    assert bench.main([f"--store={xtb_store}", "--repeats=2", "--accumulate=2", *SMALL]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["steps"]) == {"1", "2"} and max(result["differences"].values()) < 1e-5
    for seen in result["steps"].values():
        parts = [median for median, *_ in seen["percent_of_plain"].values()]
        assert seen["structures"] > 0 and len(parts) == 8 and seen["milliseconds"]["plain"] > 0
    model = result["model"]
    assert model["gradient_bytes"] == 4 * result["steps"]["1"]["parameters"]
    assert all(row["milliseconds"] > 0 and row["times_one_process"] <= row["processes"] for row in model["steps"])


def test_other_weights_are_noticed(tmp_path, capsys, monkeypatch):
    job = SimpleNamespace(check=lambda: 1e-3, close=lambda: None)
    monkeypatch.setattr(bench, "Job", lambda *_: job)
    assert bench.main([f"--store={tmp_path}"]) == 1
    assert "weights differ" in capsys.readouterr().out


def test_a_ring_of_two_gives_back_what_it_was_fitted_to():
    network = bench.Network.fit({"8": 2e-4, str(10**7): 1e-2 + 2e-4})
    assert network.latency == pytest.approx(1e-4) and network.bandwidth == pytest.approx(1e9)
    # 6 messages for three all-reduces, 2 halves of the gradients
    assert network.step(2, 10**7, 0) == pytest.approx(6e-4 + 1e-2)
    assert network.step(1, 10**7, 1) == 0
    # the bytes hardly grow with the number of processes, the messages do
    assert network.step(512, 10**7, 1) == pytest.approx(7 * 511e-4 + 3 * 511 / 512 * 1e-2)


def test_all_wait_for_the_process_with_most_work():
    assert bench.slowest([3.0, 1.0], 1) == pytest.approx(1)
    assert bench.slowest([3.0, 1.0], 2) == pytest.approx((0.75 * 3 + 0.25 * 1) / 2)
    assert bench.slowest([3.0, 1.0], 10**6) == pytest.approx(1.5)
    assert bench.slowest([2.0, 2.0], 64) == pytest.approx(1)
