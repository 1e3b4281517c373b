"""`train --forecast`: the pure part on timings made up for it, the command against a real run. No time is asserted."""

import json

import numpy as np
import psutil
import pytest
import yaml

from hpcmlip import launch
from hpcmlip.bench import forecast as bench
from hpcmlip.config import TrainSection
from hpcmlip.data.loader import TrainLoader, split_batches, split_work
from hpcmlip.errors import RunError
from hpcmlip.training import forecast, memory, probe
from hpcmlip.training.extrapolation import Cost, Range, num_validations, run_seconds, validation_seconds
from hpcmlip.training.loop import train
from hpcmlip.training.stopping import Signals, StopRequests


@pytest.fixture
def plan_work():
    """Blocks, atoms and pairs of many steps, as uneven as they come."""
    rng = np.random.default_rng(0)
    blocks, atoms = rng.integers(1, 9, 5000), rng.integers(100, 4000, 5000)
    return np.column_stack([blocks, atoms, atoms * rng.integers(3, 25, 5000)])


def seconds_of(work: np.ndarray) -> np.ndarray:
    return 2e-3 + work @ np.array([1e-3, 2e-6, 1e-6])


# ------------------------------------------------------------------------------------------------------ the pure part


def test_an_exact_law_is_found_from_fifty_steps_and_summed_over_all(plan_work):
    probed = plan_work[:50]
    cost = Cost(probed, seconds_of(probed))
    np.testing.assert_allclose(cost(plan_work), seconds_of(plan_work), rtol=1e-6)
    total = cost.range(float(cost(plan_work).sum()))
    assert total.low == pytest.approx(total.value) and total.high == pytest.approx(total.value)


def test_a_probe_of_small_steps_only_does_not_mislead(plan_work):
    """What a mean of the probed steps would."""
    small = plan_work[np.argsort(plan_work[:, 2])[:50]]
    truth = seconds_of(plan_work).sum()
    assert Cost(small, seconds_of(small))(plan_work).sum() == pytest.approx(truth, rel=1e-6)
    assert seconds_of(small).mean() * len(plan_work) < 0.5 * truth


def test_noise_shows_in_the_range_and_hardly_in_the_number(plan_work):
    noise = np.random.default_rng(1).lognormal(0, 0.3, 50)
    cost = Cost(plan_work[:50], seconds_of(plan_work[:50]) * noise / noise.mean())
    total, truth = cost.range(float(cost(plan_work).sum())), seconds_of(plan_work).sum()
    assert total.value == pytest.approx(truth, rel=0.2)
    assert total.low < 0.97 * total.value and total.high > 1.03 * total.value


def test_a_machine_that_slows_down_widens_the_range(plan_work):
    speed = np.repeat([1.0, 1.0, 1.0, 1.0, 2.0], 10)
    cost = Cost(plan_work[:50], seconds_of(plan_work[:50]) * speed)
    total, truth = cost.range(float(cost(plan_work).sum())), seconds_of(plan_work).sum()
    assert total.low < 1.1 * truth and total.high > 1.6 * truth


def test_steps_all_alike(plan_work):
    """As in a store of one molecule: the columns depend on each other."""
    alike = np.tile(plan_work[:1], (20, 1))
    assert Cost(alike, np.full(20, 0.5))(alike[:3]) == pytest.approx([0.5, 0.5, 0.5])


def test_a_validation_lasts_as_long_as_its_slowest_rank(plan_work):
    cost = Cost(plan_work[:50], seconds_of(plan_work[:50]))
    shared = plan_work[:6].reshape(3, 2, 3).copy()
    shared[2, 0] = 0  # a rank has no third batch
    expected = max(seconds_of(plan_work[[0, 2]]).sum(), seconds_of(plan_work[[1, 3, 5]]).sum())
    assert validation_seconds(cost, shared) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("epochs", "every", "expected"), [(10, 1, 10), (10, 3, 4), (9, 3, 3), (1, 5, 1)])
def test_validations_of_a_run(epochs, every, expected):
    assert num_validations(TrainSection(epochs=epochs, validate_every=every)) == expected


@pytest.mark.parametrize(
    ("settings", "saves", "extra_best"),
    [
        ({"epochs": 5}, 1, 4),  # at the end; and where a validation is the best so far
        ({"epochs": 5, "validate_every": 5}, 1, 0),
        ({"epochs": 10, "validate_every": 10}, 2, 0),  # 1000 s are more than 10 minutes
        ({"epochs": 5, "validate_every": 5, "checkpoint_steps": 30}, 1 + 200 // 30, 0),
        ({"epochs": 5, "validate_every": 5, "checkpoint_minutes": 0.0}, 201, 0),
    ],
)
def test_a_run_is_the_sum_of_its_parts(settings, saves, extra_best):
    section = TrainSection(**settings)
    found = run_seconds(
        section,
        start_up=7.0,
        steps=40 * section.epochs,
        validation=Range(1.0, 1.0, 2.0),
        epoch=Range(100.0, 90.0, 110.0),
        save=2.0,
        export=3.0,
    )
    always, best, num = 7 + 2 * saves + 2 + 3, extra_best * (2 + 3), num_validations(section)
    assert found.value == pytest.approx(100 * section.epochs + num + always + best)
    assert found.low == pytest.approx(90 * section.epochs + num + always)
    assert found.high == pytest.approx(110 * section.epochs + 2 * num + always + best)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12 ms"), (59.0, "59.0 s"), (600.0, "10.0 min"), (9e3, "2.5 h")]
)
def test_durations_in_words(seconds, text):
    assert forecast._duration(seconds) == text


def test_the_benchmark_counts_no_validation_into_an_epoch():
    def line(kind, epoch, time):
        return {"kind": kind, "epoch": epoch, "time": time}

    lines = [line("train", 0, float(i)) for i in range(10)] + [line("validation", 0, 12.0)]
    lines += [line("train", 1, 40.0 + i) for i in range(10)] + [line("validation", 1, 53.0)]
    expected = {"steps_per_epoch": 10, "epoch_seconds": 10.0, "validation_seconds": 3.5}
    assert bench.measured(lines) == expected


# ------------------------------------------------------------------------------------------------- plans and batches


def test_work_of_a_plan_is_that_of_the_batches(dataset, make_config):
    section = make_config().data
    loader = TrainLoader(dataset, section, streams=(0, 1, 2), num_streams=3, seed=3, cutoff=6.5)
    try:
        for epoch in (0, 1):
            expected = [[probe._work(blocks) for blocks in step] for step in loader.batches(epoch)]
            found = loader.work(epoch)
            full = found[..., 0] > 0  # else a structure without weight
            assert full.mean() > 0.8
            np.testing.assert_array_equal(found[full], np.array(expected)[full])
    finally:
        loader.close()


def test_work_of_a_validation_is_that_of_its_batches(dataset, make_config):
    section = make_config().data
    found = split_work(dataset, section, "val", size=2)
    for rank in (0, 1):
        batches = split_batches(dataset, section, "val", cutoff=6.5, rank=rank, size=2)
        expected = [probe._work(blocks) for blocks in batches]
        assert [row for row in found[:, rank].tolist() if row[0]] == expected


# ------------------------------------------------------------------------------------------------------------ memory


def test_memory_of_this_process():
    found = memory.host()
    now = psutil.Process().memory_info().rss
    assert 0.9 * now < found.peak and found.limit <= psutil.virtual_memory().total + now
    assert memory.host(extra=10**9).peak - found.peak == pytest.approx(10**9, abs=10**8)
    assert found.fits and not memory.Memory(found.limit + 1, found.limit).fits


@pytest.mark.parametrize(
    ("table", "file"),
    [
        ("0::/slurm/job_1/step_0\n", "slurm/job_1/memory.max"),
        ("9:cpu:/a\n4:memory:/b/c\n", "memory/b/memory.limit_in_bytes"),
    ],
)
def test_the_limit_of_a_control_group_counts_below_it(table, file, tmp_path):
    (tmp_path / "table").write_text(table)
    path = tmp_path / "root" / file
    path.parent.mkdir(parents=True)
    assert memory.control_group_limit(tmp_path / "table", tmp_path / "root") is None
    path.write_text("max\n")
    assert memory.control_group_limit(tmp_path / "table", tmp_path / "root") is None
    path.write_text("4000000\n")
    assert memory.control_group_limit(tmp_path / "table", tmp_path / "root") == 4_000_000


@pytest.mark.parametrize(
    ("env", "megabytes"),
    [
        ({}, None),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "8000"}, 8000),
        ({"SLURM_MEM_PER_CPU": "500", "SLURM_CPUS_ON_NODE": "4"}, 2000),
    ],
)
def test_memory_that_slurm_gives(env, megabytes):
    assert launch.memory_limit(env) == (megabytes and megabytes * 2**20)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def quick(monkeypatch):
    """A probe of the fewest steps."""
    for name in ("SHORT_SECONDS", "VALIDATION_SECONDS"):
        monkeypatch.setattr(probe, name, 1e-9)


def test_foretold_beside_a_run_as_it_then_goes(quick, make_config, tmp_path, capsys):
    """What can be counted is equal; a run that was begun is left as it was, and nothing else remains."""
    config = make_config(train={"epochs": 2, "patience": 3}, optim={"ema_decay": 0.9})
    run_dir = tmp_path / "mine"
    assert forecast.forecast(config, run_dir, Signals(), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
    assert train(config, run_dir, Signals()) == 0
    before = _contents(tmp_path)
    assert forecast.forecast(config, run_dir, Signals(), as_json=False) == 0
    assert _contents(tmp_path) == before
    table = capsys.readouterr().out
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert found["steps_per_epoch"] == bench.measured(lines)["steps_per_epoch"]
    assert found["epochs"] * found["steps_per_epoch"] == sum(line["kind"] == "train" for line in lines)
    assert found["validations"] == sum(line["kind"] == "validation" for line in lines)
    assert found["probed_steps"] >= probe.FEWEST_STEPS and found["fits"] is True
    assert "3 validations without improvement" in found["may_end_sooner"]
    assert found["memory"]["gpu"] is None and found["memory"]["machine"]["peak_bytes"] > 0
    for key in ("epoch", "validation", "run"):
        span = found["seconds"][key]
        assert 0 < span["low"] <= span["expected"] <= span["high"]
    hours = found["processors"]["hours"]["expected"]
    assert hours == pytest.approx(found["processors"]["count"] * found["seconds"]["run"]["expected"] / 3600)
    assert f"{found['steps_per_epoch']:,}" in table and "core-hours" in table


def _contents(folder) -> dict:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_two_ranks_foretell_together(run_values, launch, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values))
    arguments = ("-m", "hpcmlip", "train", "run.yaml", "--run-dir", "mine", "--forecast", "--json")
    text = launch(*arguments, cwd=tmp_path).stdout
    found = json.loads(text)
    assert found["ranks"] == 2 and found["processors"]["count"] >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_too_little_memory_is_exit_1(quick, make_config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(launch, "memory_limit", lambda: 10**6)
    config = make_config(train={"epochs": 1})
    assert forecast.forecast(config, tmp_path / "mine", Signals(), as_json=False) == 1
    assert "will NOT fit" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_request_to_stop_leaves_nothing(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(StopRequests, "is_requested", lambda *_, **__: True)
    with pytest.raises(RunError, match="stopped on request"):
        forecast.forecast(make_config(), tmp_path / "mine", Signals(), as_json=False)
    assert list(tmp_path.iterdir()) == []


def test_json_without_forecast_is_refused(cli, tmp_path):
    assert "--forecast" in cli("train", "run.yaml", "--json", expect=2, cwd=tmp_path).stderr
    assert list(tmp_path.iterdir()) == []
