"""R9, files of a run: a flipped bit in a model, a checkpoint or the record of the end is found, or changes nothing."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from runs import RunDir, differences

from hpcmlip.errors import UserError
from hpcmlip.models import card, export
from hpcmlip.training import checkpoint, rundir

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def read_model(run: Path):
    potential, card = export.load_model(run)
    return card, potential.state_dict()


def read_checkpoint(run: Path):
    found = checkpoint.read(RunDir(run).newest())
    return found.state, {(stem, name): t for stem, group in found.tensors.items() for name, t in group.items()}


def read_end(run: Path):
    return rundir.finished(run), {}


READERS = {
    "model": (read_model, ["model.json", "model.safetensors"]),
    "checkpoint": (
        read_checkpoint,
        [
            f"checkpoints/*/{name}"
            for name in ("MANIFEST.json", "state.json", "master.safetensors", "exp_avg.safetensors")
        ],
    ),
    "done.json": (read_end, ["done.json"]),
}
"""What is read, by what, and the files in which bits are flipped (of checkpoints: the newest)."""


@dataclass
class Outcomes:
    """Of flipped bits: refused with a sentence, read as what had been written, read as something else."""

    refused: int = 0
    identical: int = 0
    silent: int = 0


def flip(run: Path, read: Callable, patterns: list[str], flips: int, rng: random.Random) -> Outcomes:
    """Flip one bit at a time, all files alike often, and read."""
    files = [sorted(run.glob(pattern))[-1] for pattern in patterns]
    values, tensors = read(run)
    outcomes = Outcomes()
    for number in range(flips):
        path = files[number % len(files)]
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found, others = read(run)
        except UserError:
            outcomes.refused += 1
        else:
            same = found == values and others.keys() == tensors.keys()
            same = same and all(torch.equal(others[name], tensor) for name, tensor in tensors.items())
            outcomes.identical += same
            outcomes.silent += not same
        path.write_bytes(whole)
    return outcomes


@pytest.fixture
def run(undisturbed, tmp_path) -> Path:
    shutil.copytree(undisturbed.run_dir.path, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.fault("R9", sample=1, soak=3)
@pytest.mark.parametrize("kind", READERS)
def test_every_flipped_bit_is_found(run, draw, record_property, kind):
    flips = 300 if draw.is_soak else 60
    outcomes = flip(run, *READERS[kind], flips, draw.rng)
    record_property("flipped bits", flips)
    record_property("read without a change of meaning", outcomes.identical)
    assert outcomes.silent == 0 and outcomes.refused + outcomes.identical == flips
    assert outcomes.refused > flips / 2, "most of a file means something"


@pytest.mark.fault("R9", sample=1, soak=10)
def test_a_run_goes_on_from_an_older_checkpoint(run, undisturbed, mpirun, draw):
    """A bit of the newest checkpoint is flipped; the end is bitwise that of the run that nobody disturbed."""
    (run / rundir.DONE).unlink()
    path = draw.rng.choice(sorted(RunDir(run).newest().iterdir()))
    content = bytearray(path.read_bytes())
    at, bit = draw.rng.randrange(len(content)), draw.rng.randrange(8)
    print(f"bit {bit} of byte {at} of {path.name}")
    content[at] ^= 1 << bit
    path.write_bytes(content)
    ended = mpirun(2, "train", undisturbed.config, "--run-dir", run)
    assert ended.returncode == 0, ended.output
    assert f"{path.parent} " in RunDir(run).log() and "looking for an older one" in RunDir(run).log()
    assert not differences(RunDir(run), undisturbed.run_dir)


def unsealed(text: bytes, schema: int) -> dict:
    return {key: value for key, value in json.loads(text).items() if key != "digest"}


def no_digest_of_the_card(monkeypatch) -> str:
    monkeypatch.setattr(card, "unseal", unsealed)
    return "model"


def no_hash_of_the_weights(monkeypatch) -> str:
    def read(path: Path) -> tuple[Path, dict, bytes]:
        return path / card.CARD, card._read_card(path / card.CARD), (path / card.WEIGHTS).read_bytes()

    monkeypatch.setattr(export, "read_model", read)
    return "model"


def no_hash_of_the_files(monkeypatch) -> str:
    monkeypatch.setattr(checkpoint, "_verified", lambda path, entry: path.read_bytes())
    return "checkpoint"


def no_digest_of_the_end(monkeypatch) -> str:
    monkeypatch.setattr(rundir, "unseal", unsealed)
    return "done.json"


@pytest.mark.parametrize(
    "break_it",
    [
        pytest.param(no_digest_of_the_card, marks=pytest.mark.control("R9", broken="no digest of model.json")),
        pytest.param(no_hash_of_the_weights, marks=pytest.mark.control("R9", broken="no hash of model.safetensors")),
        pytest.param(no_hash_of_the_files, marks=pytest.mark.control("R9", broken="no hashes of checkpoint files")),
        pytest.param(no_digest_of_the_end, marks=pytest.mark.control("R9", broken="no digest of done.json")),
    ],
)
def test_without_the_digest_changes_are_silent(run, monkeypatch, break_it):
    kind = break_it(monkeypatch)
    assert flip(run, *READERS[kind], 120, random.Random(0)).silent
