"""NeuralIL by itself: radial functions, the power spectrum against its double sum, lengths."""

import math

import molecules
import numpy as np
import pytest
import torch
from scipy.special import eval_legendre
from torch.testing import assert_close

from hpcmlip.models import neuralil
from hpcmlip.models.neuralil import Config, Net, PowerSpectrum
from hpcmlip.models.potential import Potential

R = 3.5


def orders(n_max):
    """(l, n) of each radial function."""
    return [(ell, n) for ell in range(n_max + 1) for n in range(n_max + 1 - ell)]


@pytest.mark.parametrize("n_max", [0, 4, 7])
def test_radial_functions_are_orthonormal(n_max):
    x, weight = np.polynomial.legendre.leggauss(100)
    r = R / 2 * (1 + x)
    g = neuralil.radial_functions(r, n_max, R)
    gram = np.einsum("r,rn,rm->nm", R / 2 * weight * r**2, g, g)
    degree = np.array([ell for ell, _ in orders(n_max)])
    same = degree[:, None] == degree[None]
    np.testing.assert_allclose(gram[same], np.eye(len(degree))[same], rtol=0, atol=1e-13)


def test_the_first_radial_function():
    # j_0 = sin z / z: f_00 is, up to its norm, sin(pi x) / (pi x) + sin(2 pi x) / (2 pi x)
    x = np.linspace(0.05, 1, 30)
    expected = np.sinc(x) + np.sinc(2 * x)
    g = neuralil.radial_functions(x * R, 4, R)[:, 0]
    np.testing.assert_allclose(g / g[0], expected / expected[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("n_max", [0, 4, 7])
def test_series_gives_the_functions_and_vanishes_at_the_cutoff(n_max):
    series = torch.from_numpy(neuralil.radial_series(n_max, R))

    def values(r):
        return neuralil.cosines(r, R, len(series)) @ series

    r = torch.linspace(0.01, R, 200, dtype=torch.float64)
    expected = torch.from_numpy(neuralil.radial_functions(r.numpy(), n_max, R))
    assert expected.abs().amax(0).min() > 0.1
    assert_close(values(r), expected, rtol=0, atol=1e-12)
    value, slope = torch.autograd.functional.jvp(
        values, torch.tensor(R, dtype=torch.float64), torch.tensor(1.0).double()
    )
    assert value.abs().max() < 1e-13 and slope.abs().max() < 1e-11


def test_bessel_roots():
    # Abramowitz & Stegun, table 10.6
    assert neuralil.bessel_roots(1, 3) == pytest.approx([4.493409, 7.725252, 10.904122], abs=1e-6)
    assert neuralil.bessel_roots(4, 2) == pytest.approx([8.182561, 11.704907], abs=1e-6)
    assert neuralil.bessel_roots(0, 2) == pytest.approx([math.pi, 2 * math.pi], abs=1e-14)


def test_power_spectrum_is_the_double_sum():
    n_max = 4
    batch = molecules.batch(molecules.real("C2H6O1", slice(0, 2)))
    graph = batch.topology.graph(batch.pos, R)
    found = PowerSpectrum(Config(), 4)(batch.species, graph)
    assert found.shape == (18, 150)
    found = found.reshape(18, 10, 15)
    assert not graph.mask.sum(1).eq(8).all(), "this cutoff should leave some neighbours out"
    species = graph.lift(batch.species).numpy()
    pairs = [(a, b) for a in range(4) for b in range(a, 4)]
    for atom in (0, 3, 11):
        slots = np.flatnonzero(graph.mask[atom])
        vec, dist = graph.vec[atom, slots].numpy(), graph.dist[atom, slots].numpy()
        g = neuralil.radial_functions(dist, n_max, R)
        cos = np.clip(vec @ vec.T / np.outer(dist, dist), -1, 1)
        expected = np.zeros((10, 15))
        for p, (a, b) in enumerate(pairs):
            of_a, of_b = species[atom, slots] == a, species[atom, slots] == b
            for row, (ell, _) in enumerate(orders(n_max)):
                terms = np.outer(g[:, row], g[:, row]) * eval_legendre(ell, cos)
                expected[p, row] = (2 * ell + 1) / (4 * math.pi) * terms[of_a][:, of_b].sum()
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(found[atom], expected, rtol=0, atol=1e-13)


def test_lengths_and_layers():
    net = Net(Config(), molecules.spec())
    assert net.descriptor.length == 150
    assert [layer[0].in_features for layer in net.core] == [152, 64, 32, 16, 16]
    norms = [any(isinstance(m, torch.nn.LayerNorm) for m in layer) for layer in net.core]
    assert norms == [False, True, True, True, False]
    named = {id(p): name for name, p in net.named_parameters()}
    layers = [{named[id(p)] for p in layer} for layer in net.layers()]
    assert len(layers) == 6 and set().union(*layers) == set(named.values())
    assert layers[0] == {"embedding.weight", "core.0.0.weight", "core.0.0.bias"}
    assert layers[-1] == {"readout.head.weight", "readout.head.bias"}


def test_the_basis_stays_exact_in_double_precision():
    potential = Potential(Config(), molecules.spec(), seed=0).double()
    exact = torch.from_numpy(neuralil.radial_series(4, R))
    assert torch.equal(potential.net.descriptor.radial[:, 0], exact[:, 0])
