"""Real batches and small real models for the tests of training."""

from pathlib import Path

import pytest
import torch

from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import split_batches
from hpcmlip.models.potential import Potential
from hpcmlip.training.objective import Objective


@pytest.fixture(scope="session")
def run_values(ab_initio_store):
    """RUN.yaml as plain values: a small HIP-NN-TS on two levels, every weight of the loss in use."""
    return {
        "name": "t",
        "data": {"stores": [str(ab_initio_store)], "levels": {"dz": "EF", "cc": "E"}, "pairs_per_batch": 1200},
        "model": {"kind": "hipnn", "lmax": 2, "features": 8, "interactions": 1, "cutoff": 6.5},
        "loss": {
            "weights": {
                "dz": {"energy": 1.0, "forces": 1.0, "hierarchicality": 1.0},
                "cc": {"energy": 1.0, "forces": 1.0, "hierarchicality": 1.0},
            }
        },
        "engine": {"device": "cpu"},
    }


@pytest.fixture(scope="session")
def make_config(run_values):
    def make(**sections) -> RunConfig:
        return from_values(RunConfig, run_values | sections, Path.cwd(), where="test")

    return make


@pytest.fixture(scope="session")
def dataset(ab_initio_store) -> Dataset:
    return Dataset.open([ab_initio_store], {"dz": "EF", "cc": "E"})


@pytest.fixture(scope="session")
def micro_batches(dataset, make_config):
    """Three micro-batches of several molecule sizes, float64."""
    stream = split_batches(dataset, make_config().data, "val", cutoff=6.5, rank=0, size=1, dtype=torch.float64)
    batches = [next(stream) for _ in range(3)]
    stream.close()
    return batches


@pytest.fixture
def make_objective(dataset):
    def make(config: RunConfig) -> Objective:
        return Objective(Potential(config.model, dataset.spec, seed=1).double(), config).train()

    return make
