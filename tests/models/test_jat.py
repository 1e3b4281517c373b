"""JAT by itself: attention with an edge to itself, unscrambled heads, diatomics, parameter counts."""

import dataclasses

import molecules
import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import silu
from torch.testing import assert_close

from hpcmlip.models import jat
from hpcmlip.models.jat import Config, Net, attention
from hpcmlip.models.layers import HEAD_UNIT, polynomial_cutoff
from hpcmlip.models.potential import Potential

SMALL = {"features": 6, "heads": 3, "layers": 2, "readout": (8, 4)}
MOLECULES = molecules.real("C2H6O1", slice(0, 2))


def make(**settings) -> Potential:
    """Float64 and training mode."""
    return Potential(Config(**(SMALL | settings)), molecules.spec(), seed=1).double().train()


@pytest.mark.parametrize(
    ("layers", "features", "heads", "published"),
    [(7, 48, 1, 39529), (4, 48, 4, 258610), (5, 48, 4, 333218)],
)
def test_number_of_parameters(layers, features, heads, published):
    net = Net(Config(layers=layers, features=features, heads=heads), molecules.spec(["one"]))
    # published with a scale and a shift of the energy at the end; here the head has a bias
    assert sum(p.numel() for p in net.parameters()) == published - 2 + 1


def test_projections_start_orthogonal():
    net = Potential(Config(), molecules.spec(), seed=0).net
    for layer in (net.layers[0].sender, net.layers[1].receiver):
        gram = layer.weight.T @ layer.weight
        assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
        assert layer.bias is None


@pytest.mark.parametrize("edge_feature", ["d", "d2", "smooth_inverse"])
@pytest.mark.parametrize("update", ["skip", "gru"])
def test_network_is_its_definition(edge_feature, update):
    """Against loops over atoms, neighbours and heads."""
    potential = make(edge_feature=edge_feature, update=update, cutoff=2.5)
    net, batch = potential.net, molecules.batch(MOLECULES[:1])
    graph = batch.topology.graph(batch.pos, 2.5)
    u = polynomial_cutoff(graph, 2.5)

    def powers(r):
        x = {"d": r / 2.5, "d2": (r / 2.5) ** 2, "smooth_inverse": 1 / (1 + r)}[edge_feature]
        return 2.5 * torch.tensor([x, x**2, x**3], dtype=torch.float64)

    h = net.embed.weight.T[batch.species][:, None].expand(-1, 3, -1)
    for n, layer in enumerate(net.layers):
        old = h if n else h[:, :1]
        received = [layer.receiver(x.flatten()) for x in old]
        sent = [layer.sender(x.flatten()) for x in old]
        new = []
        for i in range(9):
            edges = [(1.0, received[i] + sent[i], 0.0, received[i])]
            for j in graph.mask[i].nonzero().flatten().tolist():
                edges.append((float(u[i, j]), received[i] + sent[j], float(graph.dist[i, j]), sent[j]))
            s = torch.stack([layer.pair_score(silu(pair)) + layer.edge_score(powers(r)) for _, pair, r, _ in edges])
            alpha = torch.tensor([e[0] for e in edges], dtype=torch.float64)[:, None] * s.exp()
            alpha = alpha / alpha.sum(0)
            message = sum(a[:, None] * value.unflatten(0, (3, 6)) for a, (*_, value) in zip(alpha, edges, strict=True))
            new.append(silu(message))
        new = torch.stack(new)
        h = h + new if update == "skip" else layer.gru(new.flatten(1), h.flatten(1)).unflatten(1, (3, 6))
        h = layer.norm(h)
    assert isinstance(net.layers[-1].norm, torch.nn.Identity)
    constant, learnt = net(batch.species, graph).unbind(1)
    assert_close(constant, net.offset(batch.species) * HEAD_UNIT)
    assert_close(learnt, net.head(net.readout(h.flatten(1))), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 3])
def test_a_distance_enters_the_logits_of_its_edge_alone(monkeypatch, heads):
    net = make(heads=heads, layers=1).net
    batch = molecules.batch(MOLECULES)
    graph = batch.topology.graph(batch.pos, 5.0)
    seen = []

    def recording(own, logits, envelope):
        seen.append((own, logits))
        return attention(own, logits, envelope)

    monkeypatch.setattr(jat, "attention", recording)
    longer = graph.dist.clone()
    longer[11, 4] += 0.3
    for dist in (graph.dist, longer):
        net(batch.species, dataclasses.replace(graph, dist=dist))
    (own, before), (own_after, after) = seen
    changed = (after != before).nonzero().tolist()
    assert changed == [[11, 4, head] for head in range(heads)]
    assert torch.equal(own, own_after)


@pytest.mark.parametrize("pair", [(1, 1), (6, 8)], ids=["same_element", "different"])
@pytest.mark.parametrize("smooth", [True, False])
def test_energy_of_a_diatomic_depends_on_its_distance(pair, smooth):
    potential = make(smooth=smooth)
    at = [potential([molecules.batch([(pair, [[0.0, 0, 0], [r, 0, 0]])])])[0] for r in (0.8, 1.2, 2.0)]
    energies = torch.cat([p.energy for p in at])
    assert energies.std(dim=0).min() > 1e-5
    assert all(p.forces[1, :, 0].abs().min() > 1e-5 for p in at)


def logits(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 2), (4, 5, 2))]


def test_attention_without_envelope_is_softmax():
    own, s = logits()
    got_own, got = attention(own, s, torch.ones(4, 5, dtype=torch.float64))
    expected = torch.softmax(torch.cat([own[:, None], s], dim=1), dim=1)
    assert_close(torch.cat([got_own[:, None], got], dim=1), expected)


def test_attention_fades_with_the_envelope():
    own, s = logits()
    u = torch.rand(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    u[0], u[1, 0], u[1, 1] = 0, 0, 1e-12
    got_own, got = attention(own, s, u)
    assert_close(got_own + got.sum(1), torch.ones(4, 2, dtype=torch.float64))
    assert torch.equal(got_own[0], torch.ones(2, dtype=torch.float64))
    assert not got[1, 0].any() and 0 < got[1, 1].max() < 1e-10
    shifted = attention(own + 700, s + 700, u)
    assert_close(shifted, (got_own, got), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gap", [-2000.0, 2000.0])
def test_attention_of_extreme_logits_is_finite(gap):
    own, s = logits()
    own, s = own.requires_grad_(), (s + gap).requires_grad_()
    u = torch.tensor([0.0, 1e-30, 1e-3, 0.0, 1.0], dtype=torch.float64).repeat(4, 1)
    u[3] = 0
    found = attention(own, s, u)
    slopes = torch.autograd.grad(sum(x.square().sum() for x in found), (own, s))
    assert all(torch.isfinite(x).all() for x in (*found, *slopes))
    assert_close(found[0] + found[1].sum(1), torch.ones(4, 2, dtype=torch.float64))


def test_limits():
    assert not Config().limits and set(Config(smooth=False).limits) == {"smooth_cutoff"}


@pytest.mark.parametrize("wrong", [{"readout": ()}, {"readout": (16, 0)}, {"heads": 0}, {"update": "none"}])
def test_contradictory_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=r"at least 1 item|greater|'skip' or 'gru'"):
        Config(**wrong)
