"""R23: `predict` reads many formats through ASE; no reader that it lets through unpickles or starts anything."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("formats_worker.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory) -> dict[str, dict[str, list[str]]]:
    folder = tmp_path_factory.mktemp("formats")
    command = [sys.executable, str(WORKER), str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    assert not (folder / "it-ran").exists()
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.fault("R23", sample=1, soak=1)
def test_no_format_does_more_than_read(seen):
    assert len(seen["predict"]) > 50
    assert not {name: events for name, events in seen["predict"].items() if events}


@pytest.mark.control("R23", broken="structures read by ASE alone: one of its readers starts a program")
def test_the_watch_sees_a_reader_that_starts_a_program(seen):
    assert "subprocess.Popen" in seen["alone"]["castep-cell"]
