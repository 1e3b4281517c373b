"""Transfer learning: what is carried over, what stays frozen, and that such a run goes on without the old model."""

import json
import logging
import shutil
from pathlib import Path

import molecules
import pytest
import safetensors.torch
import torch
import yaml
from torch.testing import assert_close

from hpcmlip import plugins
from hpcmlip.config import DataSection, RunConfig, TransferSection
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.models import ani, hipnn
from hpcmlip.models.export import load_model, save_model
from hpcmlip.models.potential import Potential
from hpcmlip.training import transfer

SMALL = {"radial_shifts": 8, "angular_shifts": 2, "angles": 4, "hidden": (12, 10, 8), "hidden_of": {"H": (14, 10, 8)}}


def save(folder: Path, config, levels) -> Potential:
    """A trained model on disk: random weights will do."""
    potential = Potential(config, molecules.spec(levels), seed=1)
    data = DataSection(stores=(Path("x.zarr"),), levels=dict.fromkeys(levels, "E"))
    folder.mkdir()
    save_model(folder, potential, config=RunConfig(name="t", data=data, model=config), card={})
    return potential


def small(kind: str, variant: str | None = None):
    """Small settings under which the contract suite runs a model: a variant, by default the first."""
    path = Path(__file__).parents[1] / "contracts" / "models" / f"{kind}.yaml"
    variants = yaml.safe_load(path.read_text())
    settings = variants[variant or next(iter(variants))]
    return plugins.find("models", kind).Config.model_validate_json(json.dumps({"kind": kind, **settings}))


HEADS = [small(kind) for kind in plugins.names("models")]
FLAG = small("egnn", "moving")


@pytest.mark.parametrize("config", [*HEADS, FLAG], ids=[*plugins.names("models"), "egnn-flag"])
def test_each_level_starts_from_the_right_head(tmp_path, config):
    old = save(tmp_path / "old", config, ("a", "b"))
    new = Potential(config, molecules.spec(("c", "b", "d")), seed=2)
    batch = molecules.batch(molecules.real("C2H6O1", slice(0, 2)), dtype=torch.float32)

    def learnt(potential):
        """Energies but for the constant part, which is that of the data."""
        residual = torch.tensor(potential.spec.residual.T, dtype=torch.float32)
        with torch.no_grad():
            energy = potential.eval()([batch], force_levels=())[0].energy
        return energy - batch.topology.sum_atoms(residual[batch.species])

    before, fresh = learnt(old), learnt(new)
    transfer.start(new, TransferSection(model=tmp_path / "old", level="a"))
    assert_close(learnt(new), before[:, [0, 1, 0]], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 0], before[:, 1], rtol=0, atol=1e-5)
    assert not torch.allclose(learnt(new), fresh, rtol=0, atol=1e-5)


def test_one_old_level_needs_no_name(tmp_path):
    config = ani.Config(**SMALL)
    old = save(tmp_path / "old", config, ("a",))
    new = Potential(config, molecules.spec(("c", "d")), seed=2)
    transfer.start(new, TransferSection(model=tmp_path / "old"))
    (head, old_head) = (potential.net.networks[1][-1].weight for potential in (new, old))
    assert torch.equal(head, old_head.expand(2, -1))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ({}, {}, "lacks the level c: give transfer.level, one of a, b"),
        ({"level": "z"}, {}, "transfer.level is 'z', .* has a, b"),
        ({"level": "a"}, {"zeta": 8.0}, r"another model \(model.zeta: 32.0 -> 8.0\)"),
        ({"level": "a"}, {"hidden": (12, 10, 9)}, "another model .*hidden"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, section, changes, message):
    save(tmp_path / "old", ani.Config(**SMALL), ("a", "b"))
    new = Potential(ani.Config(**SMALL | changes), molecules.spec(("c",)), seed=2)
    with pytest.raises(ConfigError, match=message):
        transfer.start(new, TransferSection(model=tmp_path / "old", **section))


def test_a_level_that_no_head_starts_from_is_refused(tmp_path):
    save(tmp_path / "old", ani.Config(**SMALL), ("a", "b"))
    new = Potential(ani.Config(**SMALL), molecules.spec(("b",)), seed=2)
    with pytest.raises(ConfigError, match=r"transfer\.level has no effect"):
        transfer.start(new, TransferSection(model=tmp_path / "old", level="a"))


def test_other_elements_are_refused(tmp_path, monkeypatch):
    save(tmp_path / "old", ani.Config(**SMALL), ("a",))
    monkeypatch.setattr(molecules, "ELEMENTS", (1, 6, 7, 16))
    new = Potential(ani.Config(**SMALL), molecules.spec(("a",)), seed=2)
    with pytest.raises(ConfigError, match="knows the elements H C N O, the data have H C N S"):
        transfer.start(new, TransferSection(model=tmp_path / "old"))


def test_a_model_that_is_not_there():
    new = Potential(ani.Config(**SMALL), molecules.spec(("a",)), seed=2)
    with pytest.raises(DataError, match="there is no model"):
        transfer.start(new, TransferSection(model=Path("nowhere")))


def test_frozen_layers(caplog, monkeypatch):
    potential = Potential(ani.Config(), molecules.spec(("one",)), seed=0)
    monkeypatch.setattr(logging.getLogger("hpcmlip"), "propagate", True)  # a run before may have unset it
    with caplog.at_level("INFO"):
        transfer.freeze(potential, TransferSection(model=Path("x"), freeze=(1,)))
    assert "frozen 65,280 of 325,248 weights and 464 of 1,412 biases" in caplog.text
    frozen = {name for name, p in potential.named_parameters() if not p.requires_grad}
    assert frozen == {f"net.networks.{e}.2.{kind}" for e in range(4) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("config", "freeze", "message"),
    [
        (ani.Config(**SMALL), (4,), "names layer 4, but this 'ani' has 0 to 3"),
        (ani.Config(**SMALL), (0, 1, 2, 3), "nothing would be trained"),
        (hipnn.Config(features=6, interactions=2), (3,), "has 0 to 2"),
    ],
)
def test_layers_that_cannot_be_frozen(config, freeze, message):
    with pytest.raises(ConfigError, match=message):
        transfer.freeze(Potential(config, molecules.spec(), seed=0), TransferSection(model=Path("x"), freeze=freeze))


@pytest.mark.parametrize("kind", ["egnn", "jat", "deeppot", "se3_transformer"])
def test_a_model_without_layers(kind):
    potential = Potential(small(kind), molecules.spec(), seed=0)
    with pytest.raises(ConfigError, match=f"'{kind}' does not tell its layers apart"):
        transfer.freeze(potential, TransferSection(model=Path("x"), freeze=(0,)))


# ------------------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def runs(ab_initio_store, cli, tmp_path_factory):
    """Run directories: "dz" trained on one level, "cc" started from it with layer 1 frozen, "scratch" on cc alone."""
    folder = tmp_path_factory.mktemp("transfer")

    def run(name, levels, **sections):
        values = {
            "name": name,
            "data": {"stores": [str(ab_initio_store)], "levels": levels, "pairs_per_batch": 2500},
            "model": {"kind": "ani", **SMALL, "hidden": [12, 10, 8], "hidden_of": {"H": [14, 10, 8]}},
            "optim": {"lr": 3.0e-2},
            "train": {"epochs": 2, "checkpoint_steps": 3, "keep_checkpoints": 100},
            "engine": {"device": "cpu"},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values | sections))
        cli("train", folder / f"{name}.yaml", "--run-dir", folder / name)

    run("dz", {"dz": "EF"})
    run("cc", {"cc": "E"}, transfer={"model": "dz", "freeze": [1]})
    run("scratch", {"cc": "E"})
    return folder


def test_frozen_weights_stay_and_others_learn(runs):
    old, new = (dict(load_model(runs / name)[0].named_parameters()) for name in ("dz", "cc"))
    same = {name for name in old if torch.equal(old[name], new[name])}
    assert same == {f"net.networks.{e}.2.{kind}" for e in range(4) for kind in ("weight", "bias")}
    assert "frozen 500 of 6,452 weights" in (runs / "cc" / "log.txt").read_text()


def test_the_start_is_better_than_from_scratch(runs):
    lines = [(runs / name / "metrics.jsonl").read_text().splitlines() for name in ("cc", "scratch")]
    first = [next(m["objective"] for m in map(json.loads, text) if m["kind"] == "validation") for text in lines]
    assert first[0] < 0.8 * first[1], first


def test_it_goes_on_bitwise_though_the_old_model_is_gone(runs, cli, tmp_path):
    shutil.copytree(runs / "cc", tmp_path / "cc")
    (tmp_path / "cc" / "done.json").unlink()
    steps = sorted((tmp_path / "cc" / "checkpoints").iterdir())
    for step in steps[2:]:
        shutil.rmtree(step)
    (runs / "dz").rename(runs / "gone")
    try:
        cli("train", runs / "cc.yaml", "--run-dir", tmp_path / "cc")
    finally:
        (runs / "gone").rename(runs / "dz")
    assert "going on from" in (tmp_path / "cc" / "log.txt").read_text()
    ours, theirs = (safetensors.torch.load_file(path / "cc" / "model.safetensors") for path in (tmp_path, runs))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
