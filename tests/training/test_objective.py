"""The objective against its formula, its surrogate against the whole batch, and the effect of every weight."""

import dataclasses

import numpy as np
import pytest
import torch

from hpcmlip.config import LossSection
from hpcmlip.errors import ConfigError
from hpcmlip.models.potential import Potential
from hpcmlip.training import hierarchicality
from hpcmlip.training.objective import LOSSES, Objective, log_cosh, surrogate
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


# loss.kind -> (its own options, value of errors in the unit of the loss)
FORMULAS = {
    "rmse_mae": ({}, lambda e: np.sqrt(np.mean(e**2)) + np.mean(np.abs(e))),
    "mse": ({}, lambda e: np.mean(e**2)),
    "mae": ({}, lambda e: np.mean(np.abs(e))),
    "log_cosh": ({"sharpness": 0.02}, lambda e: np.mean(np.log(np.cosh(0.02 * e)) / 0.02)),
    "huber": ({"delta": 30.0}, lambda e: np.mean(np.where(abs(e) < 30, e**2 / 2, 30 * (abs(e) - 15)))),
}
KINDS = sorted(FORMULAS)


def loss_of(kind: str, **values) -> dict:
    return {"kind": kind, **FORMULAS[kind][0], **values}


def test_every_kind_of_the_config_is_tested():
    assert set(LossSection.model_fields["kind"].annotation.__args__) == set(LOSSES) == set(FORMULAS)


@pytest.mark.parametrize("per", ["molecule", "atom", "sqrt_atom"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_is_the_formula_in_the_unit_of_the_config(make_config, make_objective, micro_batches, kind, per):
    weights = {"dz": {"energy": 2.0, "forces": 3.0}, "cc": {"energy": 5.0}}
    objective = make_objective(make_config(loss=loss_of(kind, energy_per=per, weights=weights)))
    blocks = micro_batches[0]
    predictions = objective.potential(blocks)
    power = {"molecule": 0, "atom": 1, "sqrt_atom": 1 / 4}[per]
    dz, cc = (
        torch.cat(
            [
                (p.energy - b.energy)[:, level] / (len(b.pos) / b.num_structures) ** power
                for p, b in zip(predictions, blocks, strict=True)
            ]
        )
        .detach()
        .numpy()
        for level in (0, 1)
    )
    force = (
        torch.cat([(p.forces - b.forces).flatten() for p, b in zip(predictions, blocks, strict=True)]).detach().numpy()
    )

    def term(error):
        return FORMULAS[kind][1](error[np.isfinite(error)] / KCAL_PER_MOL)

    expected = 2 * term(dz) + 3 * term(force) + 5 * term(cc)
    assert objective.value(objective(blocks)).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("sharpness", "error", "expected"),
    [(10, 0.01, 4.991689e-4), (10, 1.0, 0.9306852822), (10, -1.0, 0.9306852822), (0.1, 1.0, 0.0499168882)],
)
def test_log_cosh(sharpness, error, expected):
    assert float(log_cosh(torch.tensor(error, dtype=torch.float64), sharpness)) == pytest.approx(expected, rel=1e-6)


def test_log_cosh_of_a_large_error_is_finite():
    error = torch.tensor([-1e5, 0.0, 1e5], requires_grad=True)
    value = log_cosh(error, 10.0)
    assert value.tolist() == pytest.approx([1e5 - np.log(2) / 10, 0.0, 1e5 - np.log(2) / 10])
    assert torch.autograd.grad(value.sum(), error)[0].tolist() == [-1.0, 0.0, 1.0]


def test_the_unit_of_the_value(make_config, make_objective):
    units = {kind: make_objective(make_config(loss=loss_of(kind, unit="eV"))).unit for kind in KINDS}
    assert units == {"rmse_mae": "eV", "mae": "eV", "log_cosh": "eV", "mse": "(eV)²", "huber": "(eV)²"}


@pytest.mark.parametrize(
    ("loss", "complaint"),
    [
        ({"kind": "mse", "delta": 1.0}, "loss: delta has no effect with kind mse, only with huber"),
        ({"kind": "huber", "delta": 1.0, "sharpness": 1.0}, "sharpness has no effect with kind huber"),
        ({"kind": "huber"}, "huber needs delta"),
        ({"kind": "log_cosh"}, "log_cosh needs sharpness"),
    ],
)
def test_an_option_belongs_to_its_kind(make_config, loss, complaint):
    with pytest.raises(ConfigError, match=complaint):
        make_config(loss=loss)


@pytest.mark.parametrize("variant", ["atom", "molecule", "batch"])
def test_hierarchicality_enters_with_its_weight(make_config, make_objective, micro_batches, variant):
    none = make_objective(make_config(loss={}))
    weighted = {"dz": {"hierarchicality": 7.0}}
    some = make_objective(make_config(loss={"weights": weighted, "hierarchicality": variant}))
    blocks = micro_batches[0]
    sums = sum(hierarchicality.sums(b, p, variant) for b, p in zip(blocks, some.potential(blocks), strict=True))
    expected = none.value(none(blocks)) + 7 * hierarchicality.value(sums)[0]
    assert some.value(some(blocks)).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "variant"), [*(("rmse_mae", v) for v in ("atom", "molecule", "batch")), *((k, "atom") for k in KINDS)]
)
def test_surrogates_of_ranks_and_micro_batches_average_to_the_gradient_of_the_whole(
    make_config, make_objective, micro_batches, run_values, kind, variant
):
    config = make_config(loss=run_values["loss"] | loss_of(kind, hierarchicality=variant, energy_per="atom"))
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
    assert float((of_each - whole).norm() / whole.norm()) > 1e-2, "the mean of the parts' values would pass this test"


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_labels_give_the_slope_unless_the_objective_says_otherwise(
    make_config, make_objective, micro_batches, kind
):
    weights = {"dz": {"energy": 2.0, "forces": 3.0}, "cc": {"energy": 5.0}}
    objective = make_objective(make_config(loss=loss_of(kind, energy_per="atom", weights=weights)))
    a, b = micro_batches[:2]
    blocks = [*(without_labels(block, energy=[1]) for block in a), *(without_labels(block, forces=True) for block in b)]
    blocks[0] = dataclasses.replace(blocks[0], weight=torch.zeros_like(blocks[0].weight))
    sums, counts = objective(blocks).detach(), objective.counts(blocks)
    is_count = counts != 0
    assert is_count.sum() == 3 and torch.equal(sums[is_count], counts[is_count])  # cc has no force labels
    by_sums, by_counts = objective.slope(sums)[~is_count], objective.slope(counts)[~is_count]
    assert torch.equal(by_sums, by_counts) != objective.needs_sums
    assert objective.needs_sums == (kind == "rmse_mae")


@pytest.mark.parametrize(
    "which",
    [("dz", "energy"), ("dz", "forces"), ("dz", "hierarchicality"), ("cc", "energy"), ("cc", "hierarchicality")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_changes_the_gradient(make_config, make_objective, micro_batches, run_values, kind, which):
    (level, name), weights = which, run_values["loss"]["weights"]
    changed = {**weights, level: {**weights[level], name: 2.0}}
    before, after = (
        gradients(objective, objective.value(objective(micro_batches[0])))
        for objective in (make_objective(make_config(loss=loss_of(kind, weights=w))) for w in (weights, changed))
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
