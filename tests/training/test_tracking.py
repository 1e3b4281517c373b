"""Real W&B and MLflow: what they hold of a run that was started twice; nothing that they do reaches the run."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from runs import wait_for_end

from hpcmlip.cluster.experiment import identity
from hpcmlip.config import RunConfig, load
from hpcmlip.errors import ConfigError
from hpcmlip.trackers import FINISHED, STOPPED
from hpcmlip.training import tracking
from hpcmlip.training.rundir import RunDirectory
from hpcmlip.training.tracking import Tracking, describe

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def patient(monkeypatch):
    """On a loaded machine a tracker may need longer than training would wait."""
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 100.0)


@pytest.fixture
def make_tracking(make_config, tmp_path):
    """`make_tracking("wandb", server=None)` -> Tracking of a run in `tmp_path / "run"`, and its process."""
    (tmp_path / "run").mkdir()

    def make(kind: str, **track) -> tuple[Tracking, psutil.Process]:
        found = Tracking(make_config(track={"kind": kind, "project": "ani", **track}), tmp_path / "run")
        return found, psutil.Process(found._process.pid)

    return make


def twice(make_tracking, kind: str) -> None:
    """A run that is stopped after step 2 and makes step 2 again when it goes on, for its checkpoint is of step 1."""
    for end, steps in ((STOPPED, (1, 2)), (FINISHED, (2, 3))):
        tracker, _ = make_tracking(kind)
        for step in steps:
            tracker.log(step, {"train/loss": 1 / step})
        tracker.close(end)


@pytest.mark.usefixtures("patient")
def test_wandb_holds_one_run_for_two_starts(make_tracking, make_config, tmp_path, caplog):
    twice(make_tracking, "wandb")
    expected = describe(make_config(track={"kind": "wandb"}), tmp_path / "run")
    files = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{expected.id}.wandb"))
    assert len(files) == 2 and not caplog.records
    points = []
    for path in files:
        records = wandb_records(path)
        run = next(record.run for record in records if record.HasField("run"))
        assert (run.run_id, run.display_name, run.run_group, run.project) == (expected.id, "run", "t", "ani")
        config = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config["run_dir"] == str(tmp_path / "run") and config["model.features"] == 8
        for record in records:
            if record.HasField("history"):
                items = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                points.append((items["step"], items["train/loss"]))
    assert points == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)]


def wandb_records(path: Path) -> list:
    """What W&B wrote, which has the form of a LevelDB log: blocks of 32 kB, parts with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


@pytest.mark.usefixtures("patient")
def test_mlflow_holds_one_run_for_two_starts_and_a_kill(make_tracking, make_config, tmp_path, caplog):
    from mlflow import MlflowClient

    twice(make_tracking, "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path}/run/mlflow.db")
    experiment = client.get_experiment_by_name("ani").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED" and run.info.run_name == "run" and run.data.tags["group"] == "t"
    assert run.data.params["model.features"] == "8" and not caplog.records
    points = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((p.step, p.value) for p in points) == [(1, 1.0), (2, 0.5), (2, 0.5), (3, 1 / 3)]

    program = f"""
        import os, signal
        from pathlib import Path
        from hpcmlip.config import RunConfig, load
        from hpcmlip.training import tracking
        from hpcmlip.training.tracking import Tracking
        tracking.CLOSE_SECONDS = 100.0
        tracker = Tracking(load(RunConfig, "{tmp_path}/run.yaml"), Path("{tmp_path}/run"))
        tracker.log(4, {{"train/loss": 0.25}})
        print(tracker._process.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    values = make_config(track={"kind": "mlflow", "project": "ani"}).model_dump_json()
    (tmp_path / "run.yaml").write_text(values)  # JSON is YAML
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    wait_for_end(int(killed.stdout), 100)
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FAILED" and run.data.metrics["train/loss"] == 0.25


@pytest.mark.parametrize("kind", ["wandb", "mlflow"])
def test_a_silent_server_costs_one_warning_and_limited_time(make_tracking, monkeypatch, caplog, kind):
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 1.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        tracker, process = make_tracking(kind, server=address)
        for step in range(1000):
            tracker.log(step, {"train/loss": 1.0})
        tracker.close(FINISHED)
    (record,) = caplog.records
    assert record.getMessage().startswith(f"tracking by {kind} ends: it did not finish within 1 s") and (
        address in record.getMessage()
    )
    assert not process.is_running()


def test_a_process_that_stands_still_is_given_up(make_tracking, caplog):
    tracker, process = make_tracking("wandb")
    process.suspend()
    for step in range(200):
        tracker.log(step, {"train/loss": 1.0, "x" * 10000: 1.0})
    tracker.close(FINISHED)
    assert [record.getMessage() for record in caplog.records] == [
        "tracking by wandb ends: it takes no more figures; training goes on without it"
    ]
    assert not process.is_running()


def test_a_package_that_cannot_be_imported(make_tracking, monkeypatch, tmp_path, caplog):
    (tmp_path / "wandb.py").write_text("import no_such_module")
    path = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    tracker, process = make_tracking("wandb")
    process.wait(60)
    for step in range(3):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close(FINISHED)
    (record,) = caplog.records
    assert "No module named 'no_such_module'" in record.getMessage()
    assert "pip install 'hpcmlip[wandb]'" in record.getMessage()


def test_a_run_is_the_same_with_and_without_a_tracker(make_config, tmp_path):
    plain, tracked = make_config(), make_config(track={"kind": "mlflow"})
    assert identity(plain) == identity(tracked)
    for config in (plain, tracked, make_config(track={"kind": "wandb", "server": "https://a.b"}), plain):
        with RunDirectory(tmp_path, config):
            pass
    assert describe(tracked, tmp_path).id == describe(make_config(track={"kind": "wandb"}), tmp_path).id
    assert describe(tracked, tmp_path).id != describe(tracked, tmp_path / "other").id
    other = make_config(track={"kind": "mlflow"}, train={"seed": 1})
    assert describe(tracked, tmp_path).id != describe(other, tmp_path).id


def test_an_unknown_tracker_is_refused_with_the_nearest(make_config, tmp_path):
    with pytest.raises(ConfigError, match=r"track.kind: there is no tracker 'wandbb' \(did you mean 'wandb'"):
        make_config(track={"kind": "wandbb"})
    (tmp_path / "run.yaml").write_text(make_config().model_dump_json())
    assert load(RunConfig, tmp_path / "run.yaml", ["track.kind=mlflow"]).track.project == "hpcmlip"
