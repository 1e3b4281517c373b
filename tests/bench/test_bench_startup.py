"""A run that begins reads the metadata of its store once and lists nothing of it: two hundred may begin together."""

import json
from pathlib import Path

import pytest

from hpcmlip.bench import startup, startup_run

READ = {"z", "pos", "energy", "forces", "source"}
"""Arrays that training reads."""
READ_AT_ONCE = 1
"""Of the shards: looked at and not yet opened."""


@pytest.fixture
def started(xtb_store, write_run, tmp_path) -> dict:
    """A run to its first step, on a store of some hundred files."""
    levels = {"levels": {"gfn1": "EF", "gfn2": "E"}, "pairs_per_batch": 1250}
    return startup.start(write_run(tmp_path, store=xtb_store, data=levels), tmp_path / "run")


def test_a_start_reads_the_metadata_once_and_scans_nothing(started, xtb_store):
    uses, found = started["uses"], startup.summary(started["uses"])
    assert found["root metadata read"] == found["manifest read"] == 1 and found["other metadata read"] == 0
    assert found["folders listed"] == 0 and found["other stats"] <= 2
    shards = [path.relative_to(xtb_store).as_posix() for path in xtb_store.rglob("c/**/*") if path.is_file()]
    wanted = {name for name in shards if name.split("/")[1] in READ}
    assert 0 < found["shards opened"] <= len(wanted) < len(shards)
    assert {name for use in uses.values() for name in use if "/c/" in name} <= wanted
    # a shard that went missing is read as zeros: a look before each read, no more
    assert found["stats of shards"] <= found["openings of shards"] + READ_AT_ONCE
    # a second each, for nothing
    assert "deepspeed" in started["modules"] and not {"mlflow", "torch._inductor.compile_fx"} & set(started["modules"])


def test_listings_are_seen(tmp_path):
    watch = startup_run.Watch()
    watch.files(tmp_path)
    (tmp_path / "zarr.json").write_text("{}")
    list(tmp_path.iterdir())
    watch.stop()
    list(tmp_path.iterdir())
    assert watch.uses["listed"] == {"": 1} and watch.uses["opened"] == {"zarr.json": 1}


def test_figures_of_the_command(capsys, monkeypatch):
    seconds = {"Python and imports": 2.0, "first step": 1.0}
    uses = {"opened": {"zarr.json": 1, "manifest.json": 1, "n003/z/c/0/0": 2}, "listed": {}, "looked at": {"": 1}}
    monkeypatch.setattr(startup, "make_run", Path)
    monkeypatch.setattr(startup, "start", lambda config, run_dir: {"seconds": seconds, "uses": uses})
    assert startup.main(["--repeats=1"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["help_seconds"] >= 0 and result["train_seconds"] == seconds
    assert result["store_files"]["openings of shards"] == 2 and result["store_files"]["shards opened"] == 1
