"""The contract of a model, executable: every test here runs for every module of `hpcmlip/models/` that is a component.

A new model needs no edit. If its default settings are large, `models/KIND.yaml` beside this file names smaller ones.
"""

from contextlib import contextmanager
from pathlib import Path

import molecules
import pytest
import torch
import yaml

from hpcmlip import plugins
from hpcmlip.config import MODEL_LIMITS, ModelSection
from hpcmlip.models.potential import Potential


def _variants() -> dict[str, tuple[str, dict]]:
    """Test id -> (kind, settings)."""
    found = {}
    for kind in plugins.names("models"):
        path = Path(__file__).parent / "models" / f"{kind}.yaml"
        settings = yaml.safe_load(path.read_text()) if path.is_file() else {"defaults": {}}
        found |= {f"{kind}-{name}": (kind, values) for name, values in settings.items()}
    return found


VARIANTS = _variants()


@pytest.fixture(params=VARIANTS)
def config(request) -> ModelSection:
    kind, settings = VARIANTS[request.param]
    return plugins.find("models", kind).Config(kind=kind, **settings)


@pytest.fixture
def contract(config):
    """`with contract("rotation"): ...` around assertions: they must hold, or fail if the settings state that limit."""
    unknown = set(config.limits) - set(MODEL_LIMITS)
    assert not unknown, f"limits of no known name: {unknown}"

    @contextmanager
    def promise(*names: str):
        if not set(names) & set(config.limits):
            yield
            return
        with pytest.raises(AssertionError):
            yield

    return promise


@pytest.fixture
def potential(config) -> Potential:
    """Float64, in training mode, with weights far from the start, where damped heads would hide most mistakes."""
    potential = Potential(config, molecules.spec(), seed=3).double().train()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    _check_meaningful(potential)
    return potential


def _check_meaningful(potential: Potential) -> None:
    predicted = potential([molecules.batch(molecules.real("C2H6O1", slice(0, 8)))])[0]
    assert predicted.energy.std(dim=0).min() > 1e-3, (
        "energies hardly depend on the geometry: the contract would be void"
    )
    assert predicted.forces.square().mean().sqrt() > 1e-2, "forces nearly vanish: the contract would be void"
