"""What a run tells: lines of a log, bars on a terminal, TensorBoard; what it does where it cannot."""

import logging
import os
import time
from contextlib import contextmanager

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hpcmlip.data.loader import split_batches
from hpcmlip.errors import RunError
from hpcmlip.progress import duration
from hpcmlip.training import run_log
from hpcmlip.training.board import Board
from hpcmlip.training.metrics import MetricsFile
from hpcmlip.training.reporting import Reporter


@pytest.fixture
def logging_to(tmp_path):
    """`with logging_to(): ...` as rank 0 of a run in `tmp_path`; the handlers of the tests are put back."""
    root = logging.getLogger("hpcmlip")

    @contextmanager
    def set_up():
        before, propagate = list(root.handlers), root.propagate
        root.handlers = []
        run_log.set_up(tmp_path, 0)
        try:
            yield
        finally:
            for handler in root.handlers:
                handler.close()
            root.handlers, root.propagate = before, propagate

    return set_up


def test_a_line_of_the_log_holds_all_that_one_waits_for(make_config, logging_to, tmp_path):
    config = make_config(train={"epochs": 10, "log_seconds": 1e-6})
    with logging_to(), Reporter(config, tmp_path, enabled=True, first_step=0, seconds_left=lambda: 7200.0) as reporter:
        for step in (1, 2):
            time.sleep(0.01)
            reporter.step(step=step, epoch=step / 4, loss=12.5, lr=1e-3, structures=64, waited=0.005)
    line = (tmp_path / "log.txt").read_text().splitlines()[-1]
    for part in ("step 2, epoch 0.50 of 10: loss 12.5, lr 0.001, ", " structures/s, data wait ", "%, ", " s left, "):
        assert part in line
    assert line.endswith("job ends in 2.0 h")


def test_a_long_validation_is_shown(make_config, dataset, logging_to, tmp_path):
    config = make_config(train={"log_seconds": 1e-6})
    batches = list(split_batches(dataset, config.data, "val", cutoff=6.5, rank=0, size=1))
    total = dataset.count("val")
    with logging_to(), Reporter(config, tmp_path, enabled=True, first_step=0, seconds_left=lambda: None) as reporter:
        assert list(reporter.watch_validation(batches, total)) == batches
    lines = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "validation: " in line]
    assert len(lines) == len(batches) and f"validation: {total} of {total} structures" in lines[-1]


def test_the_board_of_a_run_that_goes_on_has_each_step_once(tmp_path):
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        board = Board(tmp_path, first_step=first)
        for step in steps:
            board.log(step, {"train/loss": 1 / step})
        board.close()
        time.sleep(1.1)  # files are read in the order of their names, which hold seconds
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 4)) for e in found.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.3333),
        (4, 0.25),
    ]


def test_a_full_disk_under_the_record_is_kept_for_all_ranks(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    metrics.add(kind="train", step=1)
    metrics.flush()
    expected = rf"cannot write \d+ bytes to {tmp_path}/metrics.jsonl \(No space left on device\)"
    with pytest.raises(RunError, match=expected):
        metrics.check()
    metrics.close()


def test_a_log_that_fills_up_is_told_once_and_what_it_missed_comes_later(logging_to, tmp_path, capfd):
    log = logging.getLogger("hpcmlip.test")
    os.mkfifo(tmp_path / "log.txt")  # takes 64 kB, until somebody reads
    reader = os.open(tmp_path / "log.txt", os.O_RDONLY | os.O_NONBLOCK)
    with logging_to():
        (file,) = [h for h in logging.getLogger("hpcmlip").handlers if isinstance(h, logging.FileHandler)]
        os.set_blocking(file.stream.fileno(), False)
        for _ in range(100):
            log.info("x" * 1000)
        assert capfd.readouterr().err.count("cannot write") == 1
        os.read(reader, 2**20)
        log.info("after")
    assert b"after" in os.read(reader, 2**20)
    os.close(reader)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (89, "89 s"), (90, "1.5 min"), (5400, "1.5 h"), (2e5, "2.3 d")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
