"""Every model is trained, stopped, continued and evaluated by the same commands, sharded optimizer included."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from hpcmlip import plugins
from hpcmlip.config import RunConfig, load
from hpcmlip.evaluation.ensemble import evaluate
from hpcmlip.models.export import load_model
from hpcmlip.training.loop import train
from hpcmlip.training.stopping import STOP_FILE

ROOT = Path(__file__).parents[2]


def small_settings(kind: str) -> dict:
    """The first of the small settings under which the contract suite runs a model."""
    path = ROOT / "tests" / "contracts" / "models" / f"{kind}.yaml"
    return {"kind": kind, **next(iter(yaml.safe_load(path.read_text()).values()))}


@pytest.mark.parametrize("kind", plugins.names("models"))
def test_train_stop_continue_evaluate(kind, ab_initio_store, make_config, tmp_path):
    config = make_config(
        data={"stores": [str(ab_initio_store)], "levels": {"dz": "EF", "cc": "E"}, "pairs_per_batch": 4000},
        model=small_settings(kind),
        loss={"kind": "rmse_mae"},
        optim={"lr": 1e-3, "clip_norm": 10.0},
        train={"epochs": 1, "micro_batches_per_step": 2},
        engine={"device": "cpu", "zero_stage": 2},
    )
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    assert train(config, alone) == 0
    stopped.mkdir()
    (stopped / STOP_FILE).touch()
    assert train(config, stopped) == 75
    steps = [int(path.name.removeprefix("step_")) for path in (stopped / "checkpoints").glob("step_*")]
    assert steps == [1]
    assert train(config, stopped) == 0
    weights = [load_model(run)[0].state_dict() for run in (alone, stopped)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    evaluate([stopped], ab_initio_store, split="test", out=tmp_path / "out", unit="kcal/mol")
    levels = json.loads((tmp_path / "out" / "metrics.json").read_text())["levels"]
    assert levels["dz"]["forces"]["rmse"] > 0 and levels["cc"]["energy"]["rmse"] > 0


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_presets_are_complete(path):
    config = load(RunConfig, path)
    assert config.model.kind == path.stem.split("_source")[0].split("_transfer")[0]
