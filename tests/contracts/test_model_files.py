"""A model that was saved is the same model."""

from pathlib import Path

import molecules
import torch

from hpcmlip.config import DataSection, RunConfig
from hpcmlip.models.export import load_model, save_model
from hpcmlip.models.potential import Potential


def test_saved_model_gives_the_same_numbers(potential, config, tmp_path):
    levels = dict.fromkeys(potential.spec.levels, "EF")
    run = RunConfig(name="t", data=DataSection(stores=(Path("x.zarr"),), levels=levels), model=config)
    single = potential.float().eval()
    save_model(tmp_path, single, config=run, card={})
    loaded, card = load_model(tmp_path)
    batch = molecules.batch(molecules.real("C2H6O1", slice(0, 3)), dtype=torch.float32)
    before, after = single([batch])[0], loaded([batch])[0]
    assert torch.equal(before.energy, after.energy) and torch.equal(before.forces, after.forces)
    assert loaded.config == config and card["spec"] == potential.spec.as_json()


def test_initial_weights_follow_from_the_seed_alone(config):
    state = torch.random.get_rng_state()
    one = Potential(config, molecules.spec(), seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(7)
    same, other = Potential(config, molecules.spec(), seed=1), Potential(config, molecules.spec(), seed=2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
