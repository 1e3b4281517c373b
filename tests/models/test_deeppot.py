"""DeepPot-SE by itself: the switch, the descriptor, the start of the weights."""

import math

import molecules
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from hpcmlip.models.deeppot import Config, Net
from hpcmlip.models.layers import HEAD_UNIT
from hpcmlip.models.long_range import switch
from hpcmlip.models.potential import Potential

MOLECULES = molecules.real("C2H6O1", slice(0, 4))


def environment(mols, **settings):
    batch = molecules.batch(mols)
    net = Net(Config(**settings), molecules.spec()).double()
    graph = batch.topology.graph(batch.pos, net.cutoff)
    return batch, net, graph, *net.environment(graph)


def test_switch_and_its_slope_are_continuous():
    start, cutoff = 4.0, 6.0

    def s(r):
        r = torch.tensor(r, dtype=torch.float64, requires_grad=True)
        value = switch(r, start, cutoff) / r
        return value.item(), torch.autograd.grad(value, r)[0].item()

    assert s(2.5) == pytest.approx((0.4, -0.16), abs=1e-15)
    h = 1e-7
    for edge, expected in ((start, (1 / start, -1 / start**2)), (cutoff, (0.0, 0.0))):
        assert s(edge - h) == pytest.approx(expected, abs=1e-6)
        assert s(edge + h) == pytest.approx(expected, abs=1e-6)
        assert s(edge) == pytest.approx(expected, abs=1e-15)
    assert s(4.5)[0] == pytest.approx((0.5 + 0.5 * math.cos(math.pi / 4)) / 4.5)
    assert s(9.0) == (0.0, 0.0)


def test_rows_of_the_environment():
    _, _, graph, s, rows = environment(MOLECULES, cutoff=3.0, switch_width=1.0)
    r = graph.dist
    weight = torch.where(r < 2, 1.0, 0.5 * torch.cos(math.pi * (r - 2)) + 0.5)
    assert_close(s, torch.where(graph.mask, weight / r, 0))
    assert_close(rows, s[..., None] * torch.cat([torch.ones_like(r)[..., None], graph.vec / r[..., None]], dim=-1))
    assert (~graph.mask).sum() > len(r) and (s[~graph.mask] == 0).all()


def test_descriptor_by_the_formula():
    """D = G^T R R^T G2 / n², with the embedding of each neighbour computed alone."""
    batch, net, graph, s, rows = environment(MOLECULES[:1], features=5, axis_features=2, num_neighbors=3.0)
    z, d = torch.nn.functional.one_hot(batch.species, 4).double(), net.local
    found = d(z, graph.lift(d.other(z)), s, rows).unflatten(1, (5, 2))
    for i in range(9):
        g = torch.stack(
            [
                d.embedding(torch.nn.functional.silu(s[i, j] * d.radial + d.own(z[i]) + d.other(z[j])))
                for j in range(9)
                if j != i
            ]
        )
        r = rows[i, [j for j in range(9) if j != i]]
        assert_close(found[i], g.T @ r @ r.T @ g[:, :2] / 9)


def test_descriptor_is_invariant():
    _, net, graph, s, rows = environment(MOLECULES)
    z = torch.nn.functional.one_hot(molecules.batch(MOLECULES).species, 4).double()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    before = net.local(z, graph.lift(net.local.other(z)), s, rows)
    # the order of the slots, and an improper rotation of the vectors
    turned = torch.cat([rows[..., :1], rows[..., 1:] @ molecules.rotation(0, improper=True).T], dim=-1)[:, order]
    after = net.local(z, graph.lift(net.local.other(z))[:, order], s[:, order], turned)
    assert_close(after, before, rtol=1e-12, atol=1e-12)
    assert before.std(0).min() > 0


def test_before_training_the_energy_is_the_fit_of_atomic_energies():
    spec = molecules.spec()
    built = Potential(Config(), spec, seed=0).eval()
    batch = molecules.batch(MOLECULES, dtype=torch.float32)
    fitted = torch.tensor(spec.residual.T[batch.species.numpy()].reshape(4, -1, 2).sum(1))
    biases = built.net.readout.head.bias.double() * HEAD_UNIT * batch.topology.num_atoms
    assert_close(built([batch])[0].energy.double(), fitted + biases, rtol=0, atol=0.05)


def test_features_tell_distances_apart_from_the_start():
    """The first layer bends within the range of s, and what comes out of the embedding has the size of its input."""
    net = Potential(Config(), molecules.spec(), seed=0).net
    bend = -net.local.own.bias / net.local.radial
    assert 0 <= bend.min() < 0.1 and 0.9 < bend.max() <= 1
    s = torch.linspace(0, 1, 50)[:, None]
    g = net.local.embedding(torch.nn.functional.silu(s * net.local.radial + net.local.own.bias))
    assert g.std(0).mean() > 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutoff": 2.0, "switch_width": 2.0}, "must be less than the cutoff"),
        ({"features": 4, "axis_features": 5}, "must not exceed"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValidationError, match=message):
        Config(**settings)
