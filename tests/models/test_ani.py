"""ANI by itself: environment vectors against torchani, counts of weights, the angular cutoff, networks by element."""

import math
import sys
import warnings
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import molecules
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from hpcmlip.models.ani import Config, Environment, Net
from hpcmlip.models.layers import HEAD_UNIT
from hpcmlip.models.potential import Potential
from hpcmlip.neighbours import neighbour_lists

SMALL = {"radial_shifts": 4, "angular_shifts": 2, "angles": 3, "hidden": (6, 5), "hidden_of": {"C": (7, 4)}}


@pytest.fixture(scope="module")
def torchani():
    # it asks setuptools, which no longer answers, for its own version
    stub = ModuleType("pkg_resources")
    stub.get_distribution = lambda _: SimpleNamespace(version="2.2.4")
    stub.DistributionNotFound = ImportError
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setitem(sys.modules, "pkg_resources", stub)
        return pytest.importorskip("torchani", reason="torchani 2.2.4 is not installed")


def environment(batch, topology=None):
    """[A, D] of a batch at the standard settings."""
    config = Config()
    graph = (topology or batch.topology).graph(batch.pos, config.cutoff)
    return Environment(config, len(molecules.ELEMENTS))(batch.species, graph)


@pytest.fixture(scope="module")
def reference(torchani):
    """Environment vectors of ANI-1x by torchani, float64."""

    def constants(*values):
        return torch.tensor(values, dtype=torch.float64)

    return torchani.AEVComputer(
        *(5.2, 3.5, constants(16), constants(*(0.9 + 0.26875 * k for k in range(16)))),
        *(constants(8), constants(32), constants(0.9, 1.55, 2.2, 2.85)),
        *(constants(*(math.pi / 16 * (2 * m + 1) for m in range(8))), len(molecules.ELEMENTS)),
    )


def by_structure(batch):
    return tuple(batch.topology.by_structure(x) for x in (batch.species, batch.pos))


@pytest.mark.parametrize("formula", ["H2O1", "C2H3N1", "C2H6O1", "C3H8"])
def test_values_and_order_are_those_of_torchani(reference, formula):
    batch = molecules.batch(molecules.real(formula, slice(0, 3)))
    expected = reference(by_structure(batch)).aevs.flatten(0, 1)
    ours = environment(batch)
    assert ours.shape[1] == 384 and expected.max() > 0.1 and (expected > 1e-3).sum(1).min() > 10
    assert_close(ours, expected, rtol=0, atol=1e-13)
    lists = neighbour_lists(batch.topology.by_structure(batch.pos).numpy(), 7.0)
    assert_close(environment(batch, lists), expected, rtol=0, atol=1e-13)


def test_energies_and_forces_are_those_of_torchani_with_the_same_weights(torchani, reference):
    potential = Potential(Config(), molecules.spec(("one",)), seed=4).double().train()
    networks = []
    for network in potential.net.networks:
        sizes = [part.in_features for part in network if isinstance(part, torch.nn.Linear)]
        hidden = [part for pair in pairwise(sizes) for part in (torch.nn.Linear(*pair), torch.nn.CELU(0.1))]
        networks.append(torch.nn.Sequential(*hidden, torch.nn.Linear(sizes[-1], 1)).double())
        networks[-1].load_state_dict(network.state_dict())
    batch = molecules.batch(molecules.real("C2H3N1", slice(0, 3)))
    batch.pos.requires_grad_()
    model = torchani.ANIModel(networks)
    energy = model(reference(by_structure(batch))).energies * HEAD_UNIT
    (slope,) = torch.autograd.grad(energy.sum(), batch.pos)
    prediction = potential([batch])[0]
    learnt = batch.topology.sum_atoms(prediction.terms[:, 1, 0])
    assert slope.abs().max() > 1e-6
    assert_close(learnt, energy, rtol=1e-12, atol=0)
    assert_close(prediction.forces[:, 0], -slope, rtol=1e-10, atol=1e-12 * slope.abs().max().item())


def test_one_neighbour():
    batch = molecules.batch([([1, 6], np.array([[0.0, 0, 0], [0, 1.1, 0]]))])
    values = environment(batch)
    carbon = values[0, 16:32]
    expected = torch.tensor([0.1177960387, 0.2071264846, 0.0361058407, 6.2395932e-4], dtype=torch.float64)
    assert_close(carbon[:4], expected, rtol=1e-6, atol=0)
    assert torch.equal(values[1, :16], carbon)
    assert not values[0, :16].any() and not values[0, 32:].any()


def test_number_of_weights_in_each_layer():
    layers = Net(Config(), molecules.spec(["one"])).layers()
    counts = [sum(p.numel() for p in layer if p.dim() == 2) for layer in layers]
    assert counts == [215040, 65280, 44544, 384] and sum(counts) == 325248
    assert [len(layer) for layer in layers] == [8] * 4
    assert [sum(p.numel() for p in layer if p.dim() == 1) for layer in layers] == [560, 464, 384, 4]


def test_initial_weights_have_the_published_spread():
    net = Potential(Config(), molecules.spec(), seed=0).net
    for network in net.networks:
        assert network[2].weight.std().item() == pytest.approx(network[2].in_features ** -0.5, rel=0.03)
        assert not network[2].bias.any()


def test_each_element_has_its_own_network():
    potential = Potential(Config(**SMALL), molecules.spec(), seed=0).double().eval()
    batch = molecules.batch(molecules.real("C2H6O1", slice(0, 2)))
    before = potential([batch])[0].terms
    for element, network in enumerate(potential.net.networks):
        with torch.no_grad():
            network[0].weight.mul_(1.5)
        after = potential([batch])[0].terms
        changed = (after != before).flatten(1).any(1)
        assert torch.equal(changed, batch.species == element), molecules.ELEMENTS[element]
        before = after


def test_the_angular_cutoff_is_smooth():
    potential = Potential(Config(**SMALL), molecules.spec(), seed=1).double().train()
    h, R = 1e-5, potential.config.angular_cutoff

    def value(distance):
        pos = np.array([[0.0, 0, 0], [1.2, 0.1, 0], [0.3, math.sqrt(distance**2 - 0.3**2), 0]])
        prediction = potential([molecules.batch([([6, 8, 1], pos)])])[0]
        return torch.cat([prediction.energy.flatten(), prediction.forces.flatten()]).detach()

    def limit(sign):
        f = [value(R + sign * k * h) for k in (1, 2, 3)]
        return 3 * f[0] - 3 * f[1] + f[2]

    assert_close(limit(-1), limit(+1), rtol=0, atol=1e-9)
    angular = environment(molecules.batch([([6, 8, 1], np.array([[0, 0, 0], [1.2, 0.1, 0], [0, R - 0.1, 0]]))]))
    assert angular[0, 64:].any(), "the pair has no angular term just inside"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_of": {"Q": (1, 1, 1)}}, "'Q' is no chemical symbol"),
        ({"hidden_of": {"H": (8, 8)}}, "hidden_of.H has 2 layers, hidden has 3"),
        ({"angular_cutoff": 6.0}, "angular_cutoff 6.0 <= cutoff 5.2"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValidationError, match=message):
        Config(**settings)
