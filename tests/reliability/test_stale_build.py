"""R17: the lock of an extension build that was killed, on which every later start of DeepSpeed would wait for ever."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from runs import RunDir, differences

from hpcmlip.cluster import machine

pytestmark = [pytest.mark.distributed]

START_SECONDS = 60
"""So much longer than without the lock a start may take, on a machine that is no busier."""

WAITS_SECONDS = 5


@pytest.fixture
def locked(tmp_path) -> dict[str, str]:
    """Environment in which builds of torch extensions are kept apart, with the lock of one that was killed long ago."""
    from torch.utils.cpp_extension import _get_build_directory

    before = os.environ.get("TORCH_EXTENSIONS_DIR")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(tmp_path / "extensions")
    try:
        folder = Path(_get_build_directory("deepspeed_shm_comm", verbose=False))
    finally:
        os.environ.pop("TORCH_EXTENSIONS_DIR")
        if before is not None:
            os.environ["TORCH_EXTENSIONS_DIR"] = before
    (folder / "lock").touch()
    os.utime(folder / "lock", (0, 0))
    return {"TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "PYTHONFAULTHANDLER": "1"}


@pytest.mark.fault("R17", sample=1, soak=3)
def test_training_starts_beside_a_stale_lock(undisturbed, locked, mpirun, tmp_path, monkeypatch, record_property, draw):
    ended = mpirun(2, "train", undisturbed.config, "--run-dir", tmp_path / "run", env=locked)
    assert ended.returncode == 0, ended.output
    assert ended.seconds < 3 * undisturbed.seconds + START_SECONDS
    assert not differences(RunDir(tmp_path / "run"), undisturbed.run_dir)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", locked["TORCH_EXTENSIONS_DIR"])
    (found,) = machine.builds()
    assert found.state == "error" and "deepspeed_shm_comm/lock" in found.text and found.remedy.startswith("rm ")
    record_property("seconds with the lock", round(ended.seconds, 1))
    record_property("without", round(undisturbed.seconds, 1))


@pytest.mark.control("R17", broken="DeepSpeed's own build of its extension")
def test_with_the_build_a_start_is_seen_to_wait(undisturbed, locked, mpirun, broken, tmp_path):
    run_dir = RunDir(tmp_path / "run")
    (lock,) = (tmp_path / "extensions").rglob("lock")
    waits = lock.with_name("waits")  # touched by broken.py where DeepSpeed's build waits for the lock
    ended = mpirun(
        *(2, "train", undisturbed.config, "--run-dir", run_dir.path),
        when=lambda: waits.exists() and time.time() - waits.stat().st_mtime > WAITS_SECONDS,
        send=signal.SIGABRT,
        env=locked | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        program=broken("build"),
    )
    assert "file_baton" in ended.output, ended.output
    assert not run_dir.steps() and not (run_dir.path / "metrics.jsonl").exists()
