"""What must not change, or must turn with the molecule."""

import dataclasses

import molecules
import numpy as np
import pytest
import torch
from torch.testing import assert_close

MOLECULES = molecules.real("C2H6O1", slice(0, 3))


def predict(potential, mols):
    return potential([molecules.batch(mols)])[0]


def moved(mols, fn):
    return [(numbers, fn(pos)) for numbers, pos in mols]


def test_translation(potential):
    before = predict(potential, MOLECULES)
    after = predict(potential, moved(MOLECULES, lambda pos: pos + np.array([3.0, -7.0, 11.0])))
    assert_close(after.energy, before.energy, rtol=1e-12, atol=1e-12)
    assert_close(after.forces, before.forces, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("improper", [False, True], ids=["rotation", "reflection"])
def test_rotation_and_reflection(potential, contract, improper):
    q = molecules.rotation(1, improper=improper)
    before = predict(potential, MOLECULES)
    after = predict(potential, moved(MOLECULES, lambda pos: pos @ q.numpy().T))
    with contract("rotation", *(["reflection"] if improper else [])):
        assert_close(after.energy, before.energy, rtol=1e-10, atol=1e-11)
        assert_close(after.forces, before.forces @ q.T, rtol=1e-10, atol=1e-10)


def test_rotation_in_single_precision(potential, contract):
    single, q = potential.float(), molecules.rotation(1).float()
    batch = molecules.batch(MOLECULES, torch.float32)
    before, after = single([batch])[0], single([dataclasses.replace(batch, pos=batch.pos @ q.T)])[0]
    turned = before.forces @ q.T
    with contract("rotation"):
        assert (after.energy - before.energy).norm() < 1e-5 * before.energy.norm()
        assert (after.forces - turned).norm() < 1e-4 * turned.norm()


def test_permutation_of_atoms(potential):
    order = np.random.default_rng(2).permutation(len(MOLECULES[0][0]))
    before = predict(potential, MOLECULES)
    after = predict(potential, [(numbers[order], pos[order]) for numbers, pos in MOLECULES])
    assert_close(after.energy, before.energy, rtol=1e-12, atol=1e-12)
    by_molecule = before.forces.unflatten(0, (len(MOLECULES), -1))
    assert_close(after.forces, by_molecule[:, torch.as_tensor(order)].flatten(0, 1), rtol=1e-11, atol=1e-11)


def test_permutation_of_molecules(potential):
    mols = MOLECULES + molecules.real("C3H6", slice(0, 2))  # nine atoms as well
    order = np.random.default_rng(3).permutation(len(mols))
    before, after = predict(potential, mols), predict(potential, [mols[i] for i in order])
    assert_close(after.energy, before.energy[torch.as_tensor(order)], rtol=1e-12, atol=1e-12)


def test_a_batch_is_its_molecules(potential):
    blocks = [molecules.real("C2H6O1", slice(0, 3)), molecules.real("H2O1", slice(0, 2)), molecules.real("C1H4")]
    together = potential([molecules.batch(block) for block in blocks])
    for block, prediction in zip(blocks, together, strict=True):
        alone = [predict(potential, [mol]) for mol in block]
        assert_close(prediction.energy, torch.cat([p.energy for p in alone]), rtol=1e-12, atol=1e-12)
        assert_close(prediction.forces, torch.cat([p.forces for p in alone]), rtol=1e-12, atol=1e-11)


def test_terms_add_up_to_the_energy(potential):
    batch = molecules.batch(MOLECULES)
    prediction = potential([batch])[0]
    assert prediction.terms.shape[::2] == (len(batch.species), len(potential.spec.levels))
    assert_close(batch.topology.sum_atoms(prediction.terms.sum(1)), prediction.energy, rtol=1e-13, atol=1e-13)


def test_molecules_far_apart_do_not_interact(potential, contract):
    one, two = molecules.real("H2O1")[0], molecules.real("C1H4")[0]
    pair = (np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1] + np.array([100.0, 0, 0])]))
    together, alone = predict(potential, [pair]), [predict(potential, [mol]) for mol in (one, two)]
    with contract("additivity"):
        assert_close(together.energy, alone[0].energy + alone[1].energy, rtol=1e-10, atol=1e-10)
        assert_close(together.forces, torch.cat([p.forces for p in alone]), rtol=1e-10, atol=1e-10)


@pytest.mark.limits(conservative=False)
def test_no_net_force_and_no_net_torque(potential, config):
    batch = molecules.batch(MOLECULES)
    forces = potential([batch])[0].forces
    torque = torch.linalg.cross(batch.pos[:, None].expand_as(forces), forces, dim=-1)
    assert batch.topology.sum_atoms(forces).abs().max() < 1e-9
    # the converse does not hold: energies that only jump under rotation have no torque
    if "rotation" not in config.limits:
        assert batch.topology.sum_atoms(torque).abs().max() < 1e-9
