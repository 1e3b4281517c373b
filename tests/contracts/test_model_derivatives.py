"""Forces are the gradient of the energy; what the loss needs of them is right too."""

import dataclasses

import molecules
import numpy as np
import pytest
import torch
from torch.testing import assert_close

MOLECULES = molecules.real("C1H2O1", slice(0, 2))


def at(batch, pos):
    return dataclasses.replace(batch, pos=pos)


def test_forces_are_minus_the_gradient(potential, contract):
    batch = molecules.batch(MOLECULES)
    forces = potential([batch])[0].forces
    h = 1e-4
    numeric = torch.zeros_like(forces)
    for atom in range(len(batch.pos)):
        for axis in range(3):
            step = torch.zeros_like(batch.pos)
            step[atom, axis] = h
            # fourth order: the cusp of tensor norms is sharp
            e = [potential([at(batch, batch.pos + k * step)])[0].energy.detach().sum(0) for k in (-2, -1, 1, 2)]
            numeric[atom, :, axis] = -(e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h)
    with contract("conservative"):
        assert_close(forces, numeric, rtol=1e-6, atol=1e-7)


def force_loss(potential, batch):
    """A scalar with all that a loss has: energies and forces of every level, squared."""
    prediction = potential([batch])[0]
    generator = torch.Generator().manual_seed(6)
    target = torch.randn(prediction.forces.shape, generator=generator, dtype=prediction.forces.dtype)
    return prediction.energy.square().sum() + (prediction.forces - target.to(prediction.forces)).square().sum()


def directional(fn, tensor, direction, h=1e-5):
    """Fourth-order central difference of fn() when `tensor` moves along `direction`."""
    start, values = tensor.detach().clone(), []
    for k in (-2, -1, 1, 2):
        with torch.no_grad():
            tensor.copy_(start + k * h * direction)
        values.append(float(fn().detach()))
    with torch.no_grad():
        tensor.copy_(start)
    return (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)


def test_gradient_of_the_force_loss(potential):
    batch = molecules.batch(MOLECULES)
    pos = batch.pos.clone().requires_grad_()
    variables = {name: p for name, p in potential.named_parameters() if p.numel()} | {"pos": pos}

    def loss():
        return force_loss(potential, at(batch, pos))

    gradients = torch.autograd.grad(loss(), list(variables.values()))
    generator = torch.Generator().manual_seed(7)
    for (name, tensor), gradient in zip(variables.items(), gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        direction = direction / direction.norm()
        expected = directional(loss, tensor, direction)
        along = float((gradient * direction).sum())
        assert along == pytest.approx(expected, rel=2e-5, abs=1e-5), (
            f"gradient of the force loss with respect to {name}"
        )


def test_second_derivatives(potential):
    batch = molecules.batch(molecules.real("H2O1"))

    def energies(pos):
        return potential([at(batch, pos)], force_levels=())[0].energy

    pos = batch.pos.clone().requires_grad_()
    assert torch.autograd.gradcheck(energies, (pos,), eps=1e-5, atol=1e-5)
    assert torch.autograd.gradgradcheck(energies, (pos,), eps=1e-5, atol=1e-4, rtol=1e-3)


def test_work_along_a_path_is_the_energy_difference(potential, contract):
    (numbers, start), (_, end) = molecules.real("H2O1", slice(0, 2))
    num_steps = 4000
    t = np.linspace(0, 1, num_steps + 1)[:, None, None]
    path = [(numbers, pos) for pos in start + t * (end - start)]
    with torch.no_grad():
        prediction = potential([molecules.batch(path)])[0]
    power = torch.einsum("tnlx,nx->tl", prediction.forces.unflatten(0, (-1, 3)), torch.tensor(end - start))
    simpson = torch.ones(num_steps + 1, 1, dtype=torch.float64)
    simpson[1:-1:2], simpson[2:-1:2] = 4, 2
    work = (simpson * power).sum(0) / (3 * num_steps)
    with contract("conservative"):
        assert_close(prediction.energy[-1] - prediction.energy[0], -work, rtol=0, atol=1e-8)


def pair_and_third(config, near: float, distance: float):
    """An atom at `distance` from the first of a bonded pair; the second atom at `near` on the axis."""
    return [([6, 8, 1], np.array([[0.0, 0, 0], [near, 0.1, 0], [distance, 0, 0]]))]


@pytest.mark.parametrize("near", [1.2, -1.2, None], ids=["between", "opposite", "diatomic"])
def test_smooth_at_the_cutoff(potential, config, contract, near):
    h = 1e-5

    def value(distance):
        mols = [([6, 1], np.array([[0.0] * 3, [distance, 0, 0]]))]
        if near is not None:
            mols = pair_and_third(config, near, distance)
        prediction = potential([molecules.batch(mols)])[0]
        return torch.cat([prediction.energy[0], prediction.forces[-1].flatten()]).detach()

    def limit(radius, sign):
        # one-sided limit: extrapolation from three points, error of third order in h
        f = [value(radius + sign * k * h) for k in (1, 2, 3)]
        return 3 * f[0] - 3 * f[1] + f[2]

    radii = [value for name, value in config if name.endswith("cutoff")]
    with contract("smooth_cutoff"):
        for radius in radii:
            assert_close(limit(radius, -1), limit(radius, +1), rtol=0, atol=1e-8)


def test_float32_forces(potential):
    batch = molecules.batch(MOLECULES)
    exact = potential([batch])[0]
    single = potential.float()([batch.to(dtype=torch.float32)])[0]
    assert (single.forces.double() - exact.forces).norm() < 1e-4 * exact.forces.norm()
    assert_close(single.energy.double(), exact.energy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", molecules.ideal())
def test_edge_cases_are_finite(potential, name):
    batch = molecules.batch([molecules.ideal()[name]] * 2)
    pos = batch.pos.clone().requires_grad_()
    prediction = potential([at(batch, pos)])[0]
    assert torch.isfinite(prediction.energy).all() and torch.isfinite(prediction.forces).all()
    loss = force_loss(potential, at(batch, pos))
    gradients = torch.autograd.grad(loss, [pos, *potential.parameters()], materialize_grads=True)
    assert all(torch.isfinite(g).all() for g in gradients)


def test_an_atom_alone_feels_no_force(potential, contract):
    cases = molecules.ideal()
    single = potential([molecules.batch([cases["single_atom"]])])[0]
    assert not single.forces.any()
    apart = potential([molecules.batch([cases["beyond_cutoff"]])])[0]
    each = [potential([molecules.batch([([z], np.zeros((1, 3)))])])[0].energy for z in cases["beyond_cutoff"][0]]
    with contract("additivity"):
        assert not apart.forces.any()
        assert_close(apart.energy, sum(each), rtol=1e-13, atol=1e-13)
