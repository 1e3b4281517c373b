"""EGNN by itself: Fourier features, its defining sums, moved coordinates, levels as flags, parameter counts."""

import math

import molecules
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from hpcmlip.models.egnn import ENVELOPES, Config, Net
from hpcmlip.models.layers import HEAD_DAMPING, HEAD_UNIT
from hpcmlip.models.potential import Potential

SMALL = {"features": 6, "layers": 2, "fourier_features": 8}
FAITHFUL = {"activation": "relu", "readout": "pooled", "envelope": "none", "levels": "flag", "cutoff": 10.6}
MOLECULES = molecules.real("C2H6O1", slice(0, 3))


def make(names=("low", "high"), seed=1, **settings) -> Potential:
    """Float64 and training mode, head not damped."""
    potential = Potential(Config(**(SMALL | settings)), molecules.spec(names), seed=seed).double().train()
    with torch.no_grad():
        potential.net.readout[-1].weight /= HEAD_DAMPING
    return potential


@pytest.mark.parametrize(
    ("num_levels", "settings", "expected"),
    [
        # the source: 4 elements and 1 flag; a one-hot flag has an entry a level, so its 5 inputs are ours of one level
        (1, FAITHFUL, 341505),
        (2, FAITHFUL, 341505 + 128),
        # heads: no flag among the inputs (128 weights), and 128 + 1 for each further head
        (1, FAITHFUL | {"levels": "heads"}, 341505 - 128),
        (2, {}, 341505 - 128 + 129),
    ],
)
def test_number_of_parameters(num_levels, settings, expected):
    net = Net(Config(**settings), molecules.spec([f"level{n}" for n in range(num_levels)]))
    assert sum(p.numel() for p in net.parameters()) == expected


def test_frequencies_are_drawn_once_and_saved():
    one, other = make(seed=1), make(seed=2)
    batch = molecules.batch(MOLECULES)
    before = one([batch])[0].energy
    assert not torch.allclose(other([batch])[0].energy, before)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other([batch])[0].energy, before)
    first, second = (layer.frequencies for layer in one.net.layers)
    assert not torch.allclose(first, second)
    assert not any(name.endswith("frequencies") for name, _ in one.named_parameters())


@pytest.mark.parametrize(("two_pi", "factor"), [(False, 1.0), (True, 2 * math.pi)])
def test_spread_of_the_frequencies(two_pi, factor):
    config = Config(features=4, fourier_features=4000, fourier_sigma=3.0, fourier_two_pi=two_pi)
    frequencies = Potential(config, molecules.spec(), seed=0).net.layers[0].frequencies
    assert frequencies.std().item() == pytest.approx(3 * factor, rel=0.05)
    assert frequencies.mean().item() == pytest.approx(0, abs=0.2 * factor)


@pytest.mark.parametrize("fourier_input", ["distance", "distance_sq"])
def test_layer_is_its_defining_sum(fourier_input):
    """The factored form against plain loops over pairs, with the features of a pair side by side."""
    layer = make(fourier_input=fourier_input, update_coords=True).net.layers[0]
    with torch.no_grad():
        layer.step[-1].weight *= 1e4
    batch = molecules.batch(MOLECULES[:1])
    graph = batch.topology.graph(batch.pos, 2.5)
    h = torch.randn(9, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    envelope = ENVELOPES["polynomial"](graph, 2.5)
    got, vec, dist = layer(h, graph.vec[:, :, None], graph.dist[:, :, None], envelope, graph)

    sums, moved = torch.zeros(9, 6, dtype=torch.float64), batch.pos.clone()
    for i, j in graph.mask.nonzero().tolist():
        r = (batch.pos[j] - batch.pos[i]).norm()
        phase = layer.frequencies * (r if fourier_input == "distance" else r * r)
        message = layer.message(layer.pair(torch.cat([h[i, 0], h[j, 0], phase.sin(), phase.cos()])))
        x = r / 2.5
        u = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
        sums[i] += u * message
        moved[i] += u * layer.step(message)[0] * (batch.pos[i] - batch.pos[j]) / (r + 1)
    assert 0 < graph.mask.sum() < 72 and (moved - batch.pos).abs().max() > 0.1
    assert_close(got[:, 0], h[:, 0] + layer.update(torch.cat([h[:, 0], sums], dim=1)), rtol=1e-12, atol=1e-12)
    near = graph.mask
    assert_close(vec[near][:, 0], (moved[None] - moved[:, None])[near], rtol=1e-12, atol=1e-12)
    assert_close(dist[near][:, 0], (vec[near][:, 0].square().sum(1) + 1e-6).sqrt(), rtol=1e-12, atol=0)


def test_moved_coordinates_matter():
    still, moving = make(layers=3), make(layers=3, update_coords=True)
    shared = {name: x for name, x in moving.state_dict().items() if ".step." not in name}
    still.load_state_dict(shared)
    batch = molecules.batch(MOLECULES)
    expected = still([batch])[0]
    with torch.no_grad():
        for layer in moving.net.layers[:-1]:
            layer.step[-1].weight.zero_()
    assert_close(moving([batch])[0].energy, expected.energy, rtol=1e-5, atol=1e-8)  # 1e-6 Å² under the root
    with torch.no_grad():
        for layer in moving.net.layers[:-1]:
            layer.step[-1].weight += 0.3
    assert (moving([batch])[0].forces - expected.forces).norm() > 1e-2 * expected.forces.norm()
    assert moving.net.layers[-1].step is None


@pytest.mark.parametrize("settings", [{}, {"readout": "pooled"}, {"update_coords": True}])
def test_a_flag_is_a_pass_of_the_network(settings):
    """Each level of two flags is what a network of one flag says that has the weights of this flag."""
    both = make(**settings, levels="flag")
    batch = molecules.batch(MOLECULES)
    together = both([batch])[0]
    for level, name in enumerate(both.spec.levels):
        one = make([name], seed=2, **settings, levels="flag")
        state = both.state_dict()
        state["net.embed.weight"] = state["net.embed.weight"][:, [0, 1, 2, 3, 4 + level]]
        state["net.offset.e0"] = state["net.offset.e0"][level : level + 1]
        one.load_state_dict(state)
        alone = one([batch])[0]
        assert_close(together.energy[:, level], alone.energy[:, 0], rtol=1e-12, atol=1e-12)
        assert_close(together.forces[:, level], alone.forces[:, 0], rtol=1e-12, atol=1e-12)
    learnt = both.net(batch.species, batch.topology.graph(batch.pos, 5.0))[:, 1]
    assert (learnt[:, 0] - learnt[:, 1]).norm() > 1e-2 * learnt.norm()


def test_a_pooled_energy_is_that_of_the_summed_features():
    potential = make(readout="pooled")
    found = {}
    potential.net.readout.register_forward_hook(lambda _, inputs, output: found.update(x=inputs[0], y=output))
    potential.net.layers[-1].register_forward_hook(lambda _, inputs, output: found.update(h=output[0]))
    prediction = potential([molecules.batch(MOLECULES)])[0]
    assert_close(found["x"], found["h"].unflatten(0, (3, 9)).sum(1))
    learnt = prediction.terms[:, 1].unflatten(0, (3, 9))
    assert_close(learnt.sum(1), found["y"][:, 0] * HEAD_UNIT)
    assert torch.equal(learnt, learnt[:, :1].expand_as(learnt))


def test_without_neighbours_only_the_element_counts():
    potential = make()
    apart = ([1, 8, 1], [[0.0, 0, 0], [30, 0, 0], [0, 30, 0]])
    terms = potential([molecules.batch([apart])])[0].terms
    assert torch.equal(terms[0], terms[2]) and not torch.allclose(terms[0], terms[1])


@pytest.mark.parametrize(
    ("settings", "limits"),
    [({}, set()), ({"update_coords": True}, set()), (FAITHFUL, {"smooth_cutoff", "additivity", "periodic"})],
)
def test_limits(settings, limits):
    assert set(Config(**settings).limits) == limits


@pytest.mark.parametrize("wrong", [{"fourier_features": 7}, {"layers": 1, "update_coords": True}, {"features": 0}])
def test_contradictory_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=r"multiple of 2|2 layers or more|greater"):
        Config(**wrong)
