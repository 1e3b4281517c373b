"""Which forces a potential computes, and when its results carry a graph."""

import molecules
import pytest
import torch
from torch.testing import assert_close

from hpcmlip.models.hipnn import Config
from hpcmlip.models.potential import Potential

CONFIG = Config(features=6, sensitivities=8, atom_layers=1)
BLOCKS = [molecules.batch(molecules.real("C2H6O1", slice(0, 3))), molecules.batch(molecules.real("H2O1", slice(0, 2)))]


@pytest.fixture
def potential() -> Potential:
    return Potential(CONFIG, molecules.spec(["a", "b", "c"], force_levels=[0, 2]), seed=0).double().train()


def test_forces_of_the_levels_of_the_spec(potential):
    by_default = potential(BLOCKS)
    for level, plane in ((0, 0), (2, 1)):
        single = potential(BLOCKS, force_levels=[level])
        for a, b in zip(by_default, single, strict=True):
            assert_close(a.forces[:, plane], b.forces[:, 0])
    assert [p.forces.shape for p in potential(BLOCKS, force_levels=[1])] == [(27, 1, 3), (6, 1, 3)]
    assert all(p.forces is None and p.energy.requires_grad for p in potential(BLOCKS, force_levels=[]))


def test_a_level_without_labels_is_left_out(potential):
    whole = potential([molecules.labelled(block, [0, 1]) for block in BLOCKS])
    part = potential([molecules.labelled(BLOCKS[0], [1]), molecules.labelled(BLOCKS[1], [])])
    for a, b in zip(whole, part, strict=True):
        assert not b.forces[:, 0].any() and a.forces[:, 0].any()
        assert torch.equal(a.forces[:, 1], b.forces[:, 1])  # labels in one block: forces for all blocks
    loss = sum(p.forces.square().sum() for p in part)
    loss.backward()
    for head in potential.net.heads:
        assert head.weight.grad is not None and torch.isfinite(head.weight.grad).all()
        assert not head.weight.grad[:2].any() and head.weight.grad[2].any()
    evaluated = potential.eval()([molecules.labelled(BLOCKS[0], [1]), molecules.labelled(BLOCKS[1], [])])
    assert all(torch.equal(a.forces, b.forces) for a, b in zip(part, evaluated, strict=True))
    asked = potential(BLOCKS)
    assert all(torch.equal(a.forces, b.forces) for a, b in zip(whole, asked, strict=True))


def test_a_block_without_any_label_gives_zero_gradients(potential):
    prediction = potential([molecules.labelled(block, []) for block in BLOCKS])
    # what a loss without labels amounts to: nothing, times everything
    sum(0.0 * (p.energy.sum() + p.forces.sum()) for p in prediction).backward()
    gradients = [p.grad for p in potential.parameters()]
    assert all(g is not None and not g.any() for g in gradients)


def test_evaluation_carries_no_graph_and_changes_nothing(potential):
    trained = potential(BLOCKS)
    evaluated = potential.eval()(BLOCKS)
    with torch.no_grad():
        inside = potential.train()(BLOCKS)
    for a, b, c in zip(trained, evaluated, inside, strict=True):
        assert a.energy.requires_grad and a.forces.requires_grad and a.terms.requires_grad
        for x in (b, c):
            assert not (x.energy.requires_grad or x.forces.requires_grad or x.terms.requires_grad)
            assert torch.equal(a.energy, x.energy) and torch.equal(a.forces, x.forces)


def test_the_batch_is_not_touched(potential):
    before = BLOCKS[0].pos.clone()
    potential(BLOCKS)[0].forces.sum().backward()
    assert not BLOCKS[0].pos.requires_grad and BLOCKS[0].pos.grad is None and torch.equal(before, BLOCKS[0].pos)
