"""Models on disk: what is refused, and that a save is all or nothing."""

import json
import resource
from pathlib import Path

import molecules
import pytest
import torch

from hpcmlip.config import DataSection, RunConfig
from hpcmlip.errors import DataError
from hpcmlip.models.card import SCHEMA
from hpcmlip.models.export import load_model, save_model
from hpcmlip.models.hipnn import Config
from hpcmlip.models.potential import Potential
from hpcmlip.sealing import seal, unseal

CONFIG = Config(features=6, sensitivities=8, atom_layers=1)
RUN = RunConfig(name="t", data=DataSection(stores=(Path("x.zarr"),), levels={"low": "EF", "high": "E"}), model=CONFIG)


@pytest.fixture
def saved(tmp_path) -> Path:
    potential = Potential(CONFIG, molecules.spec(), seed=0)
    save_model(tmp_path, potential, config=RUN, card={"best": {"step": 7, "epoch": 1, "objective": 0.5}})
    return tmp_path


def test_folder_holds_two_files_that_name_each_other(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["model.json", "model.safetensors"]
    card = json.loads((saved / "model.json").read_text())
    assert card["schema"] == SCHEMA and card["best"]["step"] == 7 and card["config"]["model"]["features"] == 6
    assert RunConfig.model_validate_json(json.dumps(card["config"])) == RUN


def test_path_of_the_card_and_of_the_folder(saved):
    by_folder, by_card = load_model(saved), load_model(saved / "model.json")
    assert by_folder[1] == by_card[1] and not by_folder[0].training
    double = load_model(saved, torch.float64)[0]
    for single, exact in zip(by_folder[0].state_dict().values(), double.state_dict().values(), strict=True):
        assert exact.dtype == torch.float64 and torch.equal(single.double(), exact)


def test_a_disk_that_takes_no_more_leaves_the_old_model(saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_model(saved, Potential(CONFIG, molecules.spec(), seed=1), config=RUN, card={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_flipped_bit_is_refused(saved):
    weights = bytearray((saved / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (saved / "model.safetensors").write_bytes(weights)
    with pytest.raises(DataError, match="sha256 differs"):
        load_model(saved)


def test_weights_of_another_step_are_refused(saved, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    save_model(other, Potential(CONFIG, molecules.spec(), seed=1), config=RUN, card={})
    (saved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(DataError, match="sha256 differs"):
        load_model(saved)


def edited(folder: Path, **changes) -> Path:
    """The model with another card, sealed as if it had been written so."""
    values = {**unseal((folder / "model.json").read_text(), SCHEMA), **changes}
    schema = values.pop("schema")
    card = {key: value for key, value in values.items() if value is not None}
    (folder / "model.json").write_text(seal(card, schema))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spec": None}, "lacks 'spec'"),
        ({"spec": {"elements": [1]}}, "does not describe"),
        ({"config": {"name": "t"}}, "is missing"),
    ],
)
def test_another_card_is_refused(saved, changes, message):
    with pytest.raises(DataError, match=message):
        load_model(edited(saved, **changes))


def test_card_of_another_network_is_refused(saved):
    config = json.loads(RUN.model_dump_json())
    config["model"]["features"] = 7
    with pytest.raises(DataError, match="does not describe the weights"):
        load_model(edited(saved, config=config))


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00\x01"])
def test_a_damaged_card_is_refused(saved, content):
    (saved / "model.json").write_text(content)
    with pytest.raises(DataError, match="damaged"):
        load_model(saved)


def test_nothing_there(tmp_path, saved):
    with pytest.raises(DataError, match="no model"):
        load_model(tmp_path / "nowhere")
    (saved / "model.safetensors").unlink()
    with pytest.raises(DataError, match="cannot read the weights"):
        load_model(saved)


def test_a_failed_save_leaves_the_old_model(saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    with pytest.raises(ValueError, match="JSON"):
        save_model(saved, Potential(CONFIG, molecules.spec(), seed=1), config=RUN, card={"best": float("nan")})
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
