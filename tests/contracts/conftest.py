"""The contract of a model, executable: every test here runs for every module of `hpcmlip/models/` that is a component.

A new model needs no edit. If its default settings are large, `models/KIND.yaml` beside this file names smaller ones.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import molecules
import pytest
import torch
import yaml

from hpcmlip import plugins
from hpcmlip.config import MODEL_LIMITS, ModelSection
from hpcmlip.models.potential import Potential


def _variants() -> dict[str, ModelSection]:
    """Test id -> settings."""
    found = {}
    for kind in plugins.names("models"):
        path = Path(__file__).parent / "models" / f"{kind}.yaml"
        settings = yaml.safe_load(path.read_text()) if path.is_file() else {"defaults": {}}
        for name, values in settings.items():
            # as a RUN.yaml is read: a YAML list may fill a tuple
            text = json.dumps({"kind": kind, **values})
            found[f"{kind}-{name}"] = plugins.find("models", kind).Config.model_validate_json(text)
    return found


VARIANTS = _variants()


def pytest_generate_tests(metafunc):
    """Every variant, of those with the limits that `@pytest.mark.limits(name=True | False)` names."""
    if "config" not in metafunc.fixturenames:
        return
    wanted = {name: value for mark in metafunc.definition.iter_markers("limits") for name, value in mark.kwargs.items()}
    chosen = {
        test_id: config
        for test_id, config in VARIANTS.items()
        if all((name in config.limits) == value for name, value in wanted.items())
    }
    metafunc.parametrize("config", chosen.values(), ids=chosen.keys())


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
