"""Hierarchicality: adds over blocks, leaves fillers out, survives 0/0."""

import dataclasses

import molecules
import pytest
import torch
from torch.testing import assert_close

from hpcmlip.batch import Prediction
from hpcmlip.training import hierarchicality

VARIANTS = sorted(hierarchicality.VARIANTS)


def prediction(batch, seed=0, zero=False):
    terms = torch.randn(len(batch.pos), 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Prediction(energy=None, forces=None, terms=(terms * (not zero)).requires_grad_())


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_add_over_blocks_and_skip_fillers(variant):
    mols = molecules.real("C2H6O1", slice(0, 5))
    whole = molecules.batch(mols)
    p = prediction(whole)
    first, second = molecules.batch(mols[:2]), molecules.batch(mols[2:])
    parts = [
        hierarchicality.sums(first, dataclasses.replace(p, terms=p.terms[:18]), variant),
        hierarchicality.sums(second, dataclasses.replace(p, terms=p.terms[18:]), variant),
    ]
    total = hierarchicality.sums(whole, p, variant)
    assert total.shape == (2, 2, 2) and total.dtype == torch.float64
    assert_close(sum(parts), total)
    filled = dataclasses.replace(whole, weight=torch.tensor([1.0, 1, 0, 0, 0]))
    assert_close(hierarchicality.sums(filled, p, variant), parts[0])


def test_values_by_hand():
    batch = molecules.batch([([1, 1], [[0.0, 0, 0], [1, 0, 0]])] * 2)
    # one level; E_0 and E_1 of the four atoms
    terms = torch.tensor([[1.0, 1], [1, 3], [2, 0], [0, 2]], dtype=torch.float64)[..., None]
    p = Prediction(energy=None, forces=None, terms=terms)
    atom = ((1 / 2 + 9 / 10) + (0 + 1)) / 2
    molecule = (10 / 12 + 4 / 8) / 2
    assert hierarchicality.value(hierarchicality.sums(batch, p, "atom")).item() == pytest.approx(atom, rel=1e-12)
    assert hierarchicality.value(hierarchicality.sums(batch, p, "molecule")).item() == pytest.approx(
        molecule, rel=1e-12
    )
    assert hierarchicality.value(hierarchicality.sums(batch, p, "batch")).item() == pytest.approx(14 / 20, rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_terms_that_vanish_give_zero_and_a_finite_gradient(variant):
    batch = molecules.batch(molecules.real("H2O1", slice(0, 2)))
    p = prediction(batch, zero=True)
    value = hierarchicality.value(hierarchicality.sums(batch, p, variant)).sum()
    (gradient,) = torch.autograd.grad(value, p.terms)
    assert value == 0 and not gradient.any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient(variant):
    batch = molecules.batch(molecules.real("H2O1", slice(0, 2)))

    def value(terms):
        return hierarchicality.value(hierarchicality.sums(batch, Prediction(None, None, terms), variant))

    assert torch.autograd.gradcheck(value, (prediction(batch, 3).terms,))
