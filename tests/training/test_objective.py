"""The objective against its formula, its surrogate against the whole batch, and the effect of every weight."""

import dataclasses

import numpy as np
import pytest
import torch

from hpcmlip.errors import ConfigError
from hpcmlip.models.potential import Potential
from hpcmlip.training import hierarchicality
from hpcmlip.training.objective import Objective, surrogate
from hpcmlip.units import KCAL_PER_MOL


def gradients(objective, scalar) -> torch.Tensor:
    """Gradient by all trainable parameters as one vector."""
    parameters = [p for p in objective.parameters() if p.requires_grad]
    found = torch.autograd.grad(scalar, parameters, allow_unused=True, retain_graph=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )


def without_labels(block, *, energy=(), forces=False):
    labels = block.energy.clone()
    labels[:, list(energy)] = torch.nan
    return dataclasses.replace(
        block, energy=labels, forces=torch.full_like(block.forces, torch.nan) if forces else block.forces
    )


def test_value_is_the_formula_in_the_unit_of_the_config(make_config, make_objective, micro_batches):
    config = make_config(loss={"weights": {"dz": {"energy": 2.0, "forces": 3.0}, "cc": {"energy": 5.0}}})
    objective = make_objective(config)
    blocks = micro_batches[0]
    predictions = objective.potential(blocks)
    dz, cc = (
        torch.cat([(p.energy - b.energy)[:, level] for p, b in zip(predictions, blocks, strict=True)]).detach().numpy()
        for level in (0, 1)
    )
    force = (
        torch.cat([(p.forces - b.forces).flatten() for p, b in zip(predictions, blocks, strict=True)]).detach().numpy()
    )

    def term(error):
        error = error[np.isfinite(error)] / KCAL_PER_MOL
        return np.sqrt(np.mean(error**2)) + np.mean(np.abs(error))

    expected = 2 * term(dz) + 3 * term(force) + 5 * term(cc)
    assert objective.value(objective(blocks)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("variant", ["atom", "molecule", "batch"])
def test_hierarchicality_enters_with_its_weight(make_config, make_objective, micro_batches, variant):
    none = make_objective(make_config(loss={}))
    weighted = {"dz": {"hierarchicality": 7.0}}
    some = make_objective(make_config(loss={"weights": weighted, "hierarchicality": variant}))
    blocks = micro_batches[0]
    sums = sum(hierarchicality.sums(b, p, variant) for b, p in zip(blocks, some.potential(blocks), strict=True))
    expected = none.value(none(blocks)) + 7 * hierarchicality.value(sums)[0]
    assert some.value(some(blocks)).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("variant", ["atom", "molecule", "batch"])
def test_surrogates_of_ranks_and_micro_batches_average_to_the_gradient_of_the_whole(
    make_config, make_objective, micro_batches, run_values, variant
):
    config = make_config(loss=run_values["loss"] | {"hierarchicality": variant})
    objective = make_objective(config)
    # uneven: one part has no label of the second level, one no forces, one lacks every energy
    a, b, c = micro_batches
    parts = [
        tuple(without_labels(block, energy=[1]) for block in a),
        tuple(without_labels(block, forces=True) for block in b[:1]),
        tuple(without_labels(block, energy=[0, 1]) for block in c),
    ]
    whole = gradients(objective, objective.value(objective([block for part in parts for block in part])))
    local = [objective(part) for part in parts]
    slope = objective.slope(sum(local).detach())
    for ranks in (1, 3):  # three micro-batches on one rank, or one on each of three
        mean = sum(gradients(objective, surrogate(sums, slope, ranks)) for sums in local) / ranks
        assert float((mean - whole).norm() / whole.norm()) < 1e-12
    of_each = sum(gradients(objective, objective.value(sums)) for sums in local) / 3
    assert float((of_each - whole).norm() / whole.norm()) > 1e-2, "the mean of RMSEs would pass this test"


@pytest.mark.parametrize(
    "which",
    [("dz", "energy"), ("dz", "forces"), ("dz", "hierarchicality"), ("cc", "energy"), ("cc", "hierarchicality")],
)
def test_every_weight_changes_the_gradient(make_config, make_objective, micro_batches, run_values, which):
    (level, name), weights = which, run_values["loss"]["weights"]
    changed = {**weights, level: {**weights[level], name: 2.0}}
    before, after = (
        gradients(objective, objective.value(objective(micro_batches[0])))
        for objective in (make_objective(make_config()), make_objective(make_config(loss={"weights": changed})))
    )
    # the regularizer is weak beside the errors at the start, but far above the rounding of float64
    assert float((after - before).norm() / before.norm()) > (1e-7 if name == "hierarchicality" else 1e-2)


def test_the_force_weight_of_a_level_trained_on_energies_alone_does_not_count(
    make_config, make_objective, micro_batches, run_values
):
    weights = run_values["loss"]["weights"]
    changed = {**weights, "cc": {**weights["cc"], "forces": 100.0}}
    values = {
        objective.value(objective(micro_batches[0])).item()
        for objective in (make_objective(make_config()), make_objective(make_config(loss={"weights": changed})))
    }
    assert len(values) == 1


def test_structures_without_weight_and_absent_labels_change_nothing(make_config, make_objective, micro_batches):
    objective = make_objective(make_config())
    blocks = micro_batches[0]
    filling = tuple(dataclasses.replace(b, weight=torch.zeros_like(b.weight)) for b in micro_batches[1])
    assert torch.equal(objective(blocks), objective((*blocks, *filling)))
    nothing = [without_labels(b, energy=[0, 1], forces=True) for b in blocks]
    assert torch.isfinite(gradients(objective, objective.value(objective(nothing)))).all()


def test_hierarchicality_needs_isolated_atoms(make_config, dataset):
    spec = dataclasses.replace(dataset.spec, isolated=(True, False))
    config = make_config()
    with pytest.raises(ConfigError, match=r"loss.weights.cc.hierarchicality is 1.*atomic_energies"):
        Objective(Potential(config.model, spec, seed=0), config)
