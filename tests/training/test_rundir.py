"""One job in a run directory, one config; stop requests; what a resumed run keeps of its metrics."""

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from runs import pretend_finished

from hpcmlip.cluster.experiment import is_finished
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.training.average import Average
from hpcmlip.training.metrics import truncate
from hpcmlip.training.rundir import CHECKPOINTS, RunDirectory, differing, finished, holder
from hpcmlip.training.stopping import SIGNALS, SLACK_SECONDS, Signals, StopRequests, margin


def test_a_second_job_is_turned_away_and_told_who_is_there(tmp_path, make_config):
    taken = pytest.raises(RunError, match=f"in use by process {os.getpid()} on")
    with RunDirectory(tmp_path / "run", make_config()), taken:
        RunDirectory(tmp_path / "run", make_config()).__enter__()
    with RunDirectory(tmp_path / "run", make_config()) as directory:
        assert directory.finished is None


def test_a_lock_left_by_a_job_of_another_machine_is_taken_over(tmp_path, make_config):
    (tmp_path / ".lock").write_text(
        "process 1 on elsewhere, Slurm job 7, a longer text than the one of this job will be"
    )
    with RunDirectory(tmp_path, make_config()):
        assert holder(tmp_path).startswith(f"process {os.getpid()} on") and "elsewhere" not in holder(tmp_path)


def test_a_file_system_without_locks_is_told(tmp_path, make_config, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(logging.getLogger("hpcmlip"), "propagate", True)
    with RunDirectory(tmp_path, make_config()):
        assert "nothing keeps a second job out" in caplog.text


def test_another_config_is_refused_with_the_keys(tmp_path, make_config):
    with RunDirectory(tmp_path, make_config(optim={"lr": 0.2})):
        pass  # refused later on, say
    with RunDirectory(tmp_path, make_config()):
        (tmp_path / CHECKPOINTS / "one").mkdir(parents=True)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"optim.lr: 0.0005 -> 0.1"):
        RunDirectory(tmp_path, make_config(optim={"lr": 0.1})).__enter__()
    assert (tmp_path / "config.yaml").read_text() == before
    with RunDirectory(tmp_path, make_config(engine={"device": "cpu", "zero_stage": 2})):
        assert "zero_stage: 2" in (tmp_path / "config.yaml").read_text()


def test_settings_that_change_a_number_may_not_differ():
    old = {"train": {"epochs": 1, "log_seconds": 1.0}, "data": {"cache_mb": 1}, "loss": {"weights": {}}}
    new = {"train": {"epochs": 2, "log_seconds": 2.0}, "data": {"cache_mb": 2}, "loss": {"weights": {"a": {"e": 1}}}}
    assert differing(old, new) == ["train.epochs: 1 -> 2", "loss.weights: {} -> None", "loss.weights.a.e: None -> 1"]


def test_an_unreadable_record_of_the_end_is_an_error(tmp_path, make_config):
    (tmp_path / "done.json").write_text("{")
    with RunDirectory(tmp_path, make_config()) as directory, pytest.raises(RunError, match=r"done.json"):
        _ = directory.finished


@pytest.fixture
def listening():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield Signals().listen()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_sets_a_flag(tmp_path, listening, number):
    requests = StopRequests(listening, tmp_path)
    assert not requests.is_requested(look_for_file=True)
    os.kill(os.getpid(), number)
    assert requests.is_requested(look_for_file=False) and requests.reason == number.name
    os.kill(os.getpid(), number)  # at once again, as torchrun passes on what the terminal has sent already


def test_a_forked_child_leaves_the_signal_to_its_parent():
    program = """
        import os, signal, time
        from hpcmlip.training.stopping import Signals
        signals = Signals().listen()
        if os.fork() == 0:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(2.2)
            os._exit(0 if signals.first is None else 1)
        print(os.waitstatus_to_exitcode(os.wait()[1]), signals.first)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout == "0 None\n", done.stderr


def test_the_end_of_the_job_counts_early_enough_for_what_was_measured(tmp_path):
    assert margin(step=2.0, save=10.0) == 2 * 2.0 + 3 * 10.0 + SLACK_SECONDS
    assert not StopRequests(Signals(), tmp_path).is_requested(look_for_file=False)
    requests = StopRequests(Signals(), tmp_path, seconds_left=SLACK_SECONDS + 100)
    assert not requests.is_requested(look_for_file=False) and 0 < requests.seconds_left() - SLACK_SECONDS <= 100
    requests.took(step=5.0)
    requests.took(save=20.0)
    assert not requests.is_requested(look_for_file=False)
    requests.took(save=40.0)
    requests.took(save=1.0)
    assert requests.is_requested(look_for_file=False) and "the job ends in 1" in requests.reason
    again = StopRequests(Signals(), tmp_path, seconds_left=-3.0)
    assert again.is_requested(look_for_file=False) and again.reason == "the job ends in 0 s"


def test_the_same_signal_later_ends_the_process():
    program = """
        import os, signal, time
        from hpcmlip.training import stopping
        stopping._IMPATIENT_SECONDS = 0.2
        stopping.Signals().listen()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGUSR1)
        print("still there", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print("not reached", flush=True)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.stdout == "still there\n" and done.returncode == 128 + signal.SIGTERM


def test_a_stop_file_counts_where_it_is_looked_for(tmp_path):
    requests = StopRequests(Signals(), tmp_path)
    (tmp_path / "STOP").touch()
    assert not requests.is_requested(look_for_file=False)
    assert requests.is_requested(look_for_file=True)
    requests.forget_file()
    assert not (tmp_path / "STOP").exists()


def test_metrics_beyond_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": kind, "step": step} for step in (1, 2, 3) for kind in ("train", "validation")]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    truncate(path, step=2, validated_step=1)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(k["kind"], k["step"]) for k in kept] == [("train", 1), ("validation", 1), ("train", 2)]


def test_average_follows_its_formula_and_gives_the_raw_weights_back():
    weight = torch.nn.Parameter(torch.zeros(3))
    average = Average({"w": weight}, decay=0.9)
    expected = torch.zeros(3)
    for n in range(20):
        weight.data = torch.full((3,), float(n))
        average.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert torch.allclose(average.tensors["w"], expected, rtol=1e-6)
    with average.in_place():
        assert torch.equal(weight.data, average.tensors["w"])
    assert torch.equal(weight.data, torch.full((3,), 19.0))
    off = Average({"w": weight}, decay=0.0)
    off.update()
    with off.in_place():
        assert torch.equal(weight.data, torch.full((3,), 19.0))


def ended(run_dir, config):
    """A finished run in little."""
    with RunDirectory(run_dir, config):
        pretend_finished(run_dir)


def test_the_record_of_the_end_is_believed_while_config_and_model_are_those(tmp_path, make_config):
    ended(tmp_path, make_config())
    assert finished(tmp_path)["step"] == 7 and is_finished(tmp_path)
    with RunDirectory(tmp_path, make_config(train={"log_seconds": 1.0})) as directory:
        assert directory.finished["step"] == 7, "a setting that changes no number"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", "others"),
        ("model.safetensors", None),
        ("model.json", '{"weights_sha256": "0"}'),
        ("config.yaml", "train: {seed: 7}"),
        ("config.yaml", None),
        ("done.json", '{"state": "finished"}'),
        ("done.json", "[]"),
    ],
)
def test_a_finished_run_that_was_changed_is_named(tmp_path, make_config, name, content):
    ended(tmp_path, make_config())
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
    with pytest.raises(RunError, match=name.replace(".", r"\.")):
        is_finished(tmp_path)


def test_a_run_without_the_record_has_not_finished(tmp_path):
    assert finished(tmp_path) is None and not is_finished(tmp_path)
