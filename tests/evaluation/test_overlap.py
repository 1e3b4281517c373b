"""Structures of an evaluated store that were trained on, though the store is another one."""

import json

import pytest

from hpcmlip import configs
from hpcmlip.data.store import open_store
from hpcmlip.evaluation.ensemble import evaluate
from hpcmlip.evaluation.overlap import trained_on


@pytest.fixture(scope="module")
def other_split(cli, tmp_path_factory):
    """The data of `ab_initio_store`, split in another way."""
    out = tmp_path_factory.mktemp("other") / "other.zarr"
    split = "split={by: structure, fractions: [0.8, 0.1, 0.1], seed: 1}"
    cli("shard", configs.path("data/ab_initio_small.yaml"), f"out={out}", split, "--workers", 1)
    return out


def rows(path, split: str) -> set[tuple]:
    """(group, row) in the raw file, read one by one."""
    store = open_store(path)
    return {
        tuple(row)
        for group in store.meta.groups
        for s in group.segments
        if s.split == split
        for row in store.array(group, "source")[s.start : s.stop, 1:].tolist()
    }


def test_structures_that_were_trained_on_are_counted(ab_initio_store, other_split):
    training = [{"path": str(ab_initio_store), "digest": open_store(ab_initio_store).digest}]
    expected = len(rows(other_split, "test") & rows(ab_initio_store, "train"))
    assert expected > 20
    assert trained_on(open_store(other_split), "test", training) == expected
    assert trained_on(open_store(ab_initio_store), "test", training) == 0
    assert trained_on(open_store(other_split), "test", [training[0] | {"digest": "another"}]) is None
    assert trained_on(open_store(other_split), "test", [{"path": "/nowhere", "digest": ""}]) is None


def test_another_raw_file_shares_nothing(xtb_store, ab_initio_store):
    training = [{"path": str(ab_initio_store), "digest": open_store(ab_initio_store).digest}]
    assert trained_on(open_store(xtb_store), "test", training) == 0


def test_the_report_says_so(experiment, other_split, ab_initio_store, tmp_path, capsys):
    evaluate([experiment], other_split, split="test", out=tmp_path / "e", unit="kcal/mol")
    (note, *_) = json.loads((tmp_path / "e" / "metrics.json").read_text())["notes"]
    expected = len(rows(other_split, "test") & rows(ab_initio_store, "train"))
    assert f"but {expected} of the structures of this split were trained on" in note
    assert f"{expected} of the structures" in " ".join(capsys.readouterr().out.split())
    assert f"{expected} of the structures" in (tmp_path / "e" / "report.html").read_text()
