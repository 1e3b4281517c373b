"""Bad sources and outputs through the real command: one clear sentence, exit code 1 or 2, nothing to trust.

The thirty bad inputs stand in test_thirty_bad_inputs.py.
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import raw_files
from edits import change, replace
from in_process import shard

from hpcmlip.errors import ConfigError
from hpcmlip.preprocess import schedule


@pytest.fixture
def refused(cli, tmp_path):
    """`refused(config, *overrides, code, says)`: the command ends with `code` and a sentence, and leaves no store."""

    def run(config, *overrides, code: int, says: str, env=None):
        finished = cli("shard", config, *overrides, "--workers", 1, expect=code, env=env)
        message = finished.stderr.strip().splitlines()[-1]
        assert message.startswith("hpcmlip: ") and "Traceback" not in finished.output
        assert says in message, message
        assert not (tmp_path / "out.zarr").is_dir()
        return message

    return run


@pytest.fixture
def raw(tmp_path) -> Path:
    return raw_files.write_ani1x(tmp_path / "raw.h5")


@pytest.fixture
def config(raw, tmp_path) -> Path:
    return raw_files.write_config(tmp_path, raw.name, "ani1x", split={"by": "structure"})


def test_absent(raw, config, refused):
    raw.unlink()
    refused(config, code=1, says="there is no source file")
    refused(config, "sources=[nothing_*.h5]", code=1, says="nothing_*.h5")
    refused(config, f"sources=[{raw.parent}]", code=1, says="is no file")


def test_one_level_named_twice(config, refused):
    config.write_text(config.read_text()[:-1] + ', "levels": {"a": "dz", "a": "tz"}}')
    refused(config, code=2, says="the key 'a' stands there twice")


def test_no_yaml(config, refused, tmp_path):
    config.write_text("name: [")
    refused(config, code=2, says="is not valid YAML")
    refused(tmp_path / "absent.yaml", code=2, says="cannot read the config")


def test_out_is_something_else(config, refused, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").write_text("mine")
    refused(config, f"out={tmp_path / 'notes'}", code=2, says="exists and is no finished store")
    assert (tmp_path / "notes" / "precious.txt").read_text() == "mine"
    refused(config, f"out={tmp_path / 'notes/precious.txt/out.zarr'}", code=1, says="cannot write")


def test_harmless_oddities(tmp_path):
    """An empty group, unknown keys, names beyond ASCII, a path with spaces, exact duplicates."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    raw = raw_files.write_ani1x(folder / "rohe Daten.h5")

    def edit(file) -> None:
        file.copy("C1H4", "Méthane ₄")
        file.copy("H2O1", "empty")
        for key in file["empty"]:
            if key != "atomic_numbers":
                replace(f"empty/{key}", lambda v: v[:0])(file)
        file["H2O1/unheard_of"] = np.zeros(3)

    change(raw, edit)
    store = shard(raw_files.write_config(folder, raw.name, "ani1x", split={"by": "structure"}))
    assert store.meta.num_structures == 5 * 20


def test_what_a_failed_run_leaves_is_not_taken_for_good(raw, config, cli, tmp_path):
    """First bad rows, then the mended file under the same name: the store is that of the mended file."""
    good = tmp_path / "good.h5"
    shutil.copy(raw, good)
    change(raw, replace("H2O1/coordinates", lambda x: x * np.nan))
    cli("shard", config, "--workers", 1, expect=1)
    shutil.copy(good, raw)
    cli("shard", config, "--workers", 1)
    mended = (tmp_path / "out.zarr" / "manifest.json").read_bytes()
    fresh = shard(config, f"out={tmp_path / 'fresh.zarr'}")
    assert (fresh.path / "manifest.json").read_bytes() == mended


def test_the_slurm_scheduler_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    with pytest.raises(ConfigError, match="needs dask-jobqueue: pip install"), schedule.executor("slurm", 2):
        pass
