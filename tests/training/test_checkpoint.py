"""Checkpoints appear complete or not at all, and damage is found, named and passed over."""

import json
import logging

import pytest
import torch

from hpcmlip.errors import RunError
from hpcmlip.training import checkpoint

TENSORS = {"master": {"a": torch.arange(6.0).reshape(2, 3)}, "exp_avg": {"a": torch.full((2, 3), -0.5)}}


def fill(folder, steps=(1, 2, 3)):
    for step in steps:
        checkpoint.write(folder, step, {"progress": {"step": step}}, TENSORS)


def test_what_was_written_is_read(tmp_path):
    fill(tmp_path)
    found = checkpoint.newest(tmp_path)
    assert found.state["step"] == 3 and found.state["progress"] == {"step": 3}
    assert torch.equal(found.tensors["master"]["a"], TENSORS["master"]["a"])
    assert torch.equal(found.tensors["exp_avg"]["a"], TENSORS["exp_avg"]["a"])


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None and checkpoint.newest(tmp_path) is None


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a flipped bit in the weights": lambda p: flip_a_bit(p / "master.safetensors"),
    "a flipped bit in the state": lambda p: flip_a_bit(p / "state.json"),
    "a file cut short": lambda p: (p / "exp_avg.safetensors").write_bytes(b"123"),
    "an empty file": lambda p: (p / "exp_avg.safetensors").write_bytes(b""),
    "a missing file": lambda p: (p / "exp_avg.safetensors").unlink(),
    "no manifest": lambda p: (p / "MANIFEST.json").unlink(),
    "half a manifest": lambda p: (p / "MANIFEST.json").write_text('{"schema": 1, "fil'),
    "a manifest of something else": lambda p: (p / "MANIFEST.json").write_text("[]"),
    "an edited manifest": lambda p: (p / "MANIFEST.json").write_text(json.dumps({"schema": 2, "files": {}})),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_the_reason(tmp_path, caplog, monkeypatch, name):
    fill(tmp_path)
    DAMAGE[name](tmp_path / "step_00000003")
    # a run sets the package's logger not to pass on; another test may have left it so
    monkeypatch.setattr(logging.getLogger("hpcmlip"), "propagate", True)
    assert checkpoint.newest(tmp_path).state["step"] == 2
    assert "step_00000003" in caplog.text and "older" in caplog.text


def test_if_none_is_sound_the_run_does_not_start_from_scratch(tmp_path):
    fill(tmp_path)
    for step in checkpoint.steps(tmp_path):
        flip_a_bit(tmp_path / checkpoint.name(step) / "master.safetensors")
    with pytest.raises(RunError, match="none of the 3 checkpoints"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("fails_at", ["write", "flush"])
def test_a_full_disk_leaves_the_old_ones_and_nothing_else(tmp_path, monkeypatch, fails_at):
    fill(tmp_path)
    real, calls = getattr(checkpoint.files, fails_at), []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            real(*arguments)
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint.files, fails_at, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write(tmp_path, 4, {}, TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.name(s) for s in (1, 2, 3)]


def test_what_a_killed_job_left_is_removed_and_never_read(tmp_path):
    fill(tmp_path, [1])
    (tmp_path / ".tmp-step_00000002").mkdir()
    assert checkpoint.newest(tmp_path).state["step"] == 1
    fill(tmp_path, [2])
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoint.name(s) for s in (1, 2)]


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    fill(tmp_path, range(1, 8))
    checkpoint.prune(tmp_path, 7, keep=2, best=3)
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    checkpoint.prune(tmp_path, 7, keep=2, best=None)
    assert checkpoint.steps(tmp_path) == [6, 7]


def test_damaged_later_ones_do_not_push_out_the_sound_ones(tmp_path):
    fill(tmp_path, (3, 6, 9))
    for step in (6, 9):
        flip_a_bit(tmp_path / checkpoint.name(step) / "master.safetensors")
    assert checkpoint.newest(tmp_path).state["step"] == 3
    fill(tmp_path, [5])
    checkpoint.prune(tmp_path, 5, keep=2, best=None)
    assert checkpoint.steps(tmp_path) == [3, 5] and checkpoint.newest(tmp_path).state["step"] == 5
