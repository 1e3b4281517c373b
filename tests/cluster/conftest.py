"""A run for experiments that are never trained."""

import pytest

from hpcmlip.config import RunConfig, from_values


@pytest.fixture
def config(xtb_store) -> RunConfig:
    """Small, with levels gfn1 EF and gfn2 E of `xtb_store`."""
    values = {
        "name": "tiny",
        "data": {"stores": [str(xtb_store)], "levels": {"gfn1": "EF", "gfn2": "E"}},
        "model": {"kind": "hipnn", "lmax": 0, "features": 4, "interactions": 1, "cutoff": 6.5},
        "train": {"epochs": 2, "micro_batches_per_step": 4, "seed": 11},
    }
    return from_values(RunConfig, values, xtb_store.parent, where="test")
