"""The list form of the graph gives what the dense form gives, and what a larger piece of a crystal gives."""

import dataclasses

import molecules
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from hpcmlip.errors import DataError

MOLECULES = molecules.real("C2H6O1", slice(0, 3))


def force_loss(potential, prediction):
    """A scalar with all that a loss has, and its gradient by every parameter."""
    generator = torch.Generator().manual_seed(6)
    target = torch.randn(prediction.forces.shape, generator=generator, dtype=torch.float64)
    loss = prediction.energy.square().sum() + (prediction.forces - target).square().sum()
    return torch.autograd.grad(loss, list(potential.parameters()), materialize_grads=True)


def close(one, other, tolerance=1e-12):
    one, other = one.detach(), other.detach()
    assert (one - other).norm() <= tolerance * max(float(other.norm()), 1.0)


def test_dense_and_list_form_agree(potential, config):
    dense = potential([molecules.batch(MOLECULES)])[0]
    lists = potential([molecules.batch(MOLECULES, reach=config.cutoff + 0.5)])[0]
    close(lists.energy, dense.energy)
    close(lists.forces, dense.forces)
    for one, other in zip(force_loss(potential, lists), force_loss(potential, dense), strict=True):
        close(one, other)


@pytest.mark.parametrize("name", ["single_atom", "beyond_cutoff", "collinear_centrosymmetric", "benzene"])
def test_edge_cases_in_list_form(potential, config, name):
    molecule = molecules.ideal()[name]
    dense = potential([molecules.batch([molecule])])[0]
    lists = potential([molecules.batch([molecule], reach=config.cutoff)])[0]
    close(lists.energy, dense.energy)
    close(lists.forces, dense.forces, 1e-11)
    assert all(torch.isfinite(g).all() for g in force_loss(potential, lists))


def test_longer_lists_change_nothing(potential, config):
    alone = potential([molecules.batch(MOLECULES[:1], reach=config.cutoff)])[0]
    dense_packing = (MOLECULES[0][0], 0.7 * MOLECULES[0][1])
    among = potential([molecules.batch([MOLECULES[0], dense_packing], reach=config.cutoff + 2)])[0]
    close(among.energy[:1], alone.energy)
    close(among.forces[: len(alone.forces)], alone.forces)


# -------------------------------------------------------------------------------------------------------- periodic


@pytest.fixture
def periodic(potential, config):
    """A function from the repeats of the cell to a prediction."""

    def predict(repeats=(1, 1, 1), move=lambda pos, cell: pos, strain=None, **options):
        (numbers, pos), cell = molecules.crystal(repeats)
        pos = move(pos, cell)
        if strain is not None:
            pos, cell = pos @ (np.eye(3) + strain), cell @ (np.eye(3) + strain)
        return potential([molecules.batch([(numbers, pos)], reach=config.cutoff, cell=cell)], **options)[0]

    return predict


@pytest.mark.limits(periodic=True)
def test_a_model_for_molecules_refuses_a_crystal(periodic):
    with pytest.raises(DataError, match="does not compute periodic structures"):
        periodic()


@pytest.mark.limits(conservative=True)
def test_a_model_without_gradient_refuses_stress(periodic):
    with pytest.raises(DataError, match="gives no stress"):
        periodic(stress=True)


@pytest.mark.limits(periodic=False)
def test_a_supercell_is_its_cells(periodic):
    one, two = periodic(), periodic((2, 1, 1))
    close(two.energy, 2 * one.energy, 1e-11)
    close(two.forces, torch.cat([one.forces] * 2), 1e-10)


@pytest.mark.limits(periodic=False)
def test_atoms_may_cross_the_boundary(periodic):
    steps = np.array([[1, 0, 0], [0, -1, 2], [0, 0, 0]])
    one, other = periodic(), periodic(move=lambda pos, cell: pos + steps @ cell)
    close(other.energy, one.energy, 1e-11)
    close(other.forces, one.forces, 1e-10)


@pytest.mark.limits(periodic=False, conservative=False)
def test_stress_is_the_derivative_by_strain(periodic):
    volume, h = abs(np.linalg.det(molecules.CELL)), 1e-4
    stress = periodic(stress=True).stress
    assert stress.shape == (1, 2, 3, 3)
    assert_close(stress, stress.transpose(2, 3))
    for a, b in ((0, 0), (1, 2), (0, 2)):
        strain = np.zeros((3, 3))
        strain[a, b] += h / 2
        strain[b, a] += h / 2
        e = [periodic(strain=k * strain).energy for k in (-2, -1, 1, 2)]
        numeric = (e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h * volume)
        assert_close(stress[:, :, a, b], numeric, rtol=2e-5, atol=1e-7)


@pytest.mark.limits(periodic=False, conservative=False)
def test_forces_of_a_crystal_are_minus_the_gradient(potential, config):
    (numbers, pos), cell = molecules.crystal()
    batch = molecules.batch([(numbers, pos)], reach=config.cutoff + 0.1, cell=cell)
    forces, h = potential([batch])[0].forces, 1e-4
    for atom, axis in ((0, 0), (1, 1), (2, 2)):
        step = torch.zeros_like(batch.pos)
        step[atom, axis] = h
        moved = [dataclasses.replace(batch, pos=batch.pos + k * step) for k in (-2, -1, 1, 2)]
        e = [potential([b])[0].energy for b in moved]
        numeric = -(e[0] - 8 * e[1] + 8 * e[2] - e[3]) / (12 * h)
        assert_close(forces[atom, :, axis], numeric[0], rtol=1e-6, atol=1e-6)
