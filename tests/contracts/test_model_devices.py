"""What a GPU waits for: a training step stays on the device of the model, and asks it nothing on the way.

On "meta", whose tensors hold no numbers: reading one fails there, as it would make the host wait on a GPU.
"""

from pathlib import Path

import molecules
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpcmlip.config import RunConfig
from hpcmlip.training.objective import Objective, surrogate


class StaysOnDevice(TorchDispatchMode):
    """Fails where a tensor in the memory of the host enters an operation; single numbers may."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        strays = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and not x.is_meta and x.dim()]
        assert not strays, f"{func} takes a tensor {tuple(strays[0].shape)} of the host"
        return func(*args, **kwargs or {})


@pytest.fixture
def objective(potential, config) -> Objective:
    run = {"name": "r", "data": {"stores": (Path("s"),), "levels": {"low": "EF", "high": "EF"}}}
    terms = "hierarchicality" if config.kind == "hipnn" else "energy"
    weights = {level: {"energy": 1, "forces": 1} | {terms: 1} for level in ("low", "high")}
    config = RunConfig.model_validate(run | {"model": config, "loss": {"weights": weights}})
    return Objective(potential, config).to("meta").train()


def test_strays_are_seen():
    x = torch.ones(3, device="meta")
    with pytest.raises(AssertionError, match="of the host"), StaysOnDevice():
        x.index_select(0, torch.arange(2))


def test_training_step_stays_on_the_device(objective, config):
    structures = [molecules.batch(molecules.real(formula, slice(0, 3))) for formula in ("C2H6O1", "H2O1")]
    blocks = [molecules.labelled(block, [0]).to("meta") for block in structures]
    try:
        with StaysOnDevice():
            sums = objective(blocks)
            # the slope comes from the host, where all ranks' sums are added up
            surrogate(sums, torch.empty_like(sums), 2).backward()
    except (RuntimeError, NotImplementedError) as error:
        assert "meta" in str(error).lower()
        # the sizes of what it computes follow from the positions
        assert config.not_compiled
    else:
        assert all(p.grad is not None for p in objective.parameters() if p.requires_grad)
