"""Small ensembles trained here for a few steps, and one evaluation of them."""

import json
from pathlib import Path

import pytest
import torch

from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import TrainLoader
from hpcmlip.evaluation.ensemble import evaluate
from hpcmlip.models.export import save_model
from hpcmlip.models.potential import Potential
from hpcmlip.training.errors import error_sums, level_figures
from hpcmlip.training.rundir import RunDirectory, write_end

LEVELS = {"dz": "EF", "cc": "E"}


def make_member(
    run: Path, store: Path, *, seed: int, steps: int = 30, levels: dict = LEVELS, name: str = "tiny"
) -> Path:
    """Train a small HIP-NN-TS for `steps` steps and leave a run directory as `hpcmlip train` does."""
    config = from_values(
        RunConfig,
        {
            "name": name,
            "data": {"stores": [str(store)], "levels": levels, "pairs_per_batch": 2000},
            "model": {"kind": "hipnn", "lmax": 1, "features": 8, "interactions": 1, "cutoff": 6.5},
            "train": {"seed": seed},
        },
        run,
        where="test",
    )
    dataset = Dataset.open([store], levels)
    potential = Potential(config.model, dataset.spec, seed=seed).train()
    optimizer = torch.optim.Adam(potential.parameters(), lr=5e-3)
    loader = TrainLoader(dataset, config.data, streams=[0], num_streams=1, seed=seed, cutoff=config.model.cutoff)
    run.mkdir(parents=True)
    with (run / "metrics.jsonl").open("w") as log:
        for step, (blocks,) in zip(range(1, steps + 1), loader.batches(0), strict=False):
            sums = sum(error_sums(dataset.spec, b, p) for b, p in zip(blocks, potential(blocks), strict=True))
            loss = (sums[..., 1] / sums[..., 0].clamp(min=1)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 10 == 0:
                record = {"kind": "validation", "step": step, "epoch": step / 10, "objective": float(loss.detach())}
                levels_now = level_figures(sums.detach().numpy(), dataset.spec.levels, "kcal/mol")
                log.write(json.dumps(record | {"unit": "kcal/mol", "levels": levels_now}) + "\n")
    loader.close()
    card = {
        "best": {"step": step, "epoch": 1, "objective": float(loss.detach())},
        "data": [{"path": str(store), "digest": dataset.stores[0].digest}],
        "versions": {},
    }
    save_model(run, potential, config=config, card=card)
    with RunDirectory(run, config):
        write_end(run, {"reason": f"{steps} steps done", "step": step})
    return run


@pytest.fixture(scope="session")
def train_member():
    """`make_member`, for tests that need one of their own."""
    return make_member


@pytest.fixture(scope="session")
def experiment(ab_initio_store, tmp_path_factory) -> Path:
    """An experiment directory with three members, trained on dz energies and forces and cc energies; read only."""
    folder = tmp_path_factory.mktemp("experiments") / "tiny"
    for seed in range(3):
        make_member(folder / f"member_{seed:02d}", ab_initio_store, seed=seed)
    return folder


@pytest.fixture(scope="session")
def evaluated(experiment, ab_initio_store, tmp_path_factory) -> Path:
    """The folder of an evaluation of `experiment` on the test split; read only."""
    out = tmp_path_factory.mktemp("evaluations") / "out"
    evaluate([experiment], ab_initio_store, split="test", out=out, unit="kcal/mol")
    return out
