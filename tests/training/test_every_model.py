"""Every model is trained, stopped, continued and evaluated by the same commands, sharded optimizer included."""

import json
from pathlib import Path

import molecules
import pytest
import torch
import yaml

from hpcmlip import plugins
from hpcmlip.config import RunConfig, load
from hpcmlip.errors import DataError
from hpcmlip.evaluation.ensemble import evaluate
from hpcmlip.models.export import load_model
from hpcmlip.training.engine import Engine
from hpcmlip.training.loop import train
from hpcmlip.training.stopping import STOP_FILE, Signals

ROOT = Path(__file__).parents[2]


def small_settings(kind: str) -> dict:
    """The first of the small settings under which the contract suite runs a model."""
    path = ROOT / "tests" / "contracts" / "models" / f"{kind}.yaml"
    return {"kind": kind, **next(iter(yaml.safe_load(path.read_text()).values()))}


@pytest.mark.parametrize("kind", plugins.names("models"))
def test_train_stop_continue_evaluate(kind, ab_initio_store, make_config, monkeypatch, tmp_path):
    config = make_config(
        data={"stores": [str(ab_initio_store)], "levels": {"dz": "EF", "cc": "E"}, "pairs_per_batch": 4000},
        model=small_settings(kind),
        loss={"kind": "rmse_mae"},
        optim={"lr": 1e-3, "clip_norm": 10.0},
        train={"epochs": 1, "micro_batches_per_step": 2},
        engine={"device": "cpu", "zero_stage": 2},
    )
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert train(config, alone, Signals()) == 0

    def step(self, *arguments, original=Engine.step):
        (stopped / STOP_FILE).touch()
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", step)
        assert train(config, stopped, Signals()) == 75
    steps = [int(path.name.removeprefix("step_")) for path in (stopped / "checkpoints").glob("step_*")]
    assert steps == [2]
    assert train(config, stopped, Signals()) == 0
    weights = [load_model(run)[0].state_dict() for run in (alone, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    evaluate([stopped], ab_initio_store, split="test", out=tmp_path / "out", unit="kcal/mol")
    levels = json.loads((tmp_path / "out" / "metrics.json").read_text())["levels"]
    assert levels["dz"]["forces"]["rmse"] > 0 and levels["cc"]["energy"]["rmse"] > 0


@pytest.mark.parametrize("labels", ["E", "EF"])
def test_direct_forces_are_those_of_the_levels_trained_on_forces(labels, ab_initio_store, make_config, tmp_path):
    small = {"max_degree": 1, "layers": 2, "channels": 4, "heads": 2, "radial_hidden": 6, "radial_functions": 4}
    config = make_config(
        data={"stores": [str(ab_initio_store)], "levels": {"dz": labels, "cc": "E"}, "pairs_per_batch": 4000},
        model={"kind": "se3_transformer", **small, "forces": "direct"},
        loss={"kind": "rmse_mae"},
        train={"epochs": 1, "micro_batches_per_step": 2},
        engine={"device": "cpu", "zero_stage": 2},
    )
    assert train(config, tmp_path / "run", Signals()) == 0
    evaluate([tmp_path / "run"], ab_initio_store, split="test", out=tmp_path / "out", unit="kcal/mol")
    levels = json.loads((tmp_path / "out" / "metrics.json").read_text())["levels"]
    # the store has the labels, but an untrained output is nothing to compare them with
    assert ("forces" in levels["dz"]) == (labels == "EF") and levels["dz"]["energy"]["rmse"] > 0
    potential, batch = load_model(tmp_path / "run")[0], molecules.batch(molecules.real("H2O1"), torch.float32)
    with pytest.raises(DataError, match="gives no forces of cc"):
        potential([batch], force_levels=[1])


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_complete(path):
    config = load(RunConfig, path)
    assert config.model.kind == path.stem.split("_source")[0].split("_transfer")[0]
