"""Yogi against its formula, element by element."""

import math

import pytest
import torch

from hpcmlip.config import OptimSection
from hpcmlip.training.optimizers import MOMENTS, OPTIMIZERS

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-3}


def closed_form(p: float, gradients: list[float], weight_decay: float) -> float:
    m, v = 0.0, 1e-6
    for t, gradient in enumerate(gradients, start=1):
        g = gradient + weight_decay * p
        m = 0.9 * m + 0.1 * g
        v = v - 0.001 * math.copysign(1, v - g * g) * g * g
        p -= 1e-2 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-3)
    return p


def test_every_kind_of_the_config_is_there():
    assert set(OptimSection.model_fields["kind"].annotation.__args__) == set(OPTIMIZERS)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_yogi(weight_decay):
    start = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    # the second moment grows, falls (gradients below its root) and stays
    gradients = [[1.0, 1e-4, 0.0], [-2.0, 1e-4, 0.0], [1e-3, 50.0, 0.0], [1e-3, 1e-3, 0.0], [0.3, -7.0, 0.0]]
    parameters = [torch.nn.Parameter(start[:1].clone()), torch.nn.Parameter(start[1:].clone())]
    optimizer = OPTIMIZERS["yogi"](parameters, **SETTINGS, weight_decay=weight_decay)
    for row in torch.tensor(gradients, dtype=torch.float64):
        parameters[0].grad, parameters[1].grad = row[:1].clone(), row[1:].clone()
        optimizer.step()
    expected = [
        closed_form(float(p), list(column), weight_decay)
        for p, column in zip(start, zip(*gradients, strict=True), strict=True)
    ]
    found = torch.cat(parameters).tolist()
    assert found == pytest.approx(expected, rel=1e-12)
    assert {*MOMENTS, "step"} == optimizer.state[parameters[0]].keys()
    assert found[2] == 3.0 or weight_decay, "a parameter without a gradient stays"


def test_yogi_leaves_parameters_without_gradients_alone():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = OPTIMIZERS["yogi"]([used, unused], **SETTINGS, weight_decay=0.1)
    used.grad = torch.ones(2)
    optimizer.step()
    assert torch.equal(unused, torch.ones(2)) and not torch.equal(used, torch.ones(2))
