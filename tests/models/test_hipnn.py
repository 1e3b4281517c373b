"""HIP-NN-TS by itself: radial functions, tensors, parameter counts, levels that do not touch each other."""

import molecules
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from hpcmlip.models import hipnn, layers
from hpcmlip.models.hipnn import HEAD_UNIT, Config, Net
from hpcmlip.models.potential import Potential

SMALL = {"features": 6, "sensitivities": 8, "atom_layers": 1}


def meaningful(potential: Potential) -> Potential:
    """Float64 and training mode, heads not damped."""
    with torch.no_grad():
        for head in potential.double().net.heads:
            head.weight /= layers.HEAD_DAMPING
    return potential.train()


# figures of spec 1.2: soft_min 0.75, soft_max 5.5, cutoff 6.5 Å
RADIAL_SUMS = {
    20: {0.96: 1.3083163607, 1.5: 1.2114386418, 4.0: 0.4463057195, 6.4: 4.5577e-4},
    7: {0.96: 1.1600266511, 1.5: 1.0708656192, 4.0: 0.3898305060, 6.4: 6.0632e-4},
}


@pytest.mark.parametrize("num", [20, 7])
def test_radial_functions(num):
    mu, sigma = hipnn.initial_sensitivities(num, 0.75, 5.5)
    assert_close(sigma, torch.full((num,), {20: 30.0, 7: 10.5}[num], dtype=torch.float64))
    some = {20: [5.5, 4.125, 3.3, 2.75, 2.357143], 7: [5.5, 2.6757, 1.7679, 1.32, 1.0532, 0.8761, 0.75]}[num]
    assert_close(mu[: len(some)], torch.tensor(some, dtype=torch.float64), rtol=0, atol=5e-5)
    for distance, expected in RADIAL_SUMS[num].items():
        batch = molecules.batch([([1, 1], [[0.0, 0, 0], [distance, 0, 0]])])
        graph = batch.topology.graph(batch.pos, 6.5)
        s = hipnn.sensitivities(graph.dist, mu, sigma) * hipnn.cosine_cutoff(graph, 6.5)[..., None]
        assert_close(s[0, 1].sum().item(), expected, rtol=5e-5 if expected < 1e-2 else 1e-9, atol=0)


def test_no_sensitivity_is_denormal():
    mu, sigma = (x.float() for x in hipnn.initial_sensitivities(20, 0.75, 5.5))
    dist = torch.linspace(0.3, 6.5, 500).requires_grad_()
    s = hipnn.sensitivities(dist, mu, sigma)
    (slope,) = torch.autograd.grad(s.sum(), dist)
    assert s.max() > 0.9 and (s == 0).any()
    tiny = torch.finfo(torch.float32).tiny
    assert not any(((x != 0) & (x.abs() < tiny)).any() for x in (s, slope))


@pytest.mark.parametrize(
    ("features", "interactions", "atom_layers", "expected"),
    [(20, 2, 3, 16286), (64, 1, 4, 43373), (128, 1, 4, 160429), (128, 2, 3, 587606), (128, 2, 4, 653654)],
)
def test_number_of_parameters(features, interactions, atom_layers, expected):
    config = Config(features=features, interactions=interactions, atom_layers=atom_layers)
    net = Net(config, molecules.spec(["one"]))
    # the frozen head 0 is a buffer here, a parameter in the published counts
    assert sum(p.numel() for p in net.parameters()) + net.offset.e0.numel() == expected


def test_initial_weights_have_the_published_spread():
    net = Potential(Config(), molecules.spec(["one"]), seed=0).net
    for (interaction, *_), num_in in zip(net.blocks, (4, 128), strict=True):
        base = interaction.base
        assert base.weight.std().item() == pytest.approx((2 / (num_in * 148)) ** 0.5, rel=0.03)
        assert base.own.weight.std().item() == pytest.approx((2 / (num_in + 128)) ** 0.5, rel=0.1)
        assert all(t.std().item() == pytest.approx(1, rel=0.25) for t in base.scales)
    assert net.heads[0].weight.abs().max().item() == pytest.approx(0.01 / 128**0.5, rel=0.1)


def test_before_training_the_energy_is_the_fit_of_atomic_energies():
    spec = molecules.spec()
    potential = Potential(Config(features=16), spec, seed=0).eval()
    batch = molecules.batch(molecules.real("C2H6O1", slice(0, 4)), dtype=torch.float32)
    fitted = torch.tensor(spec.residual.T[batch.species.numpy()].reshape(4, -1, 2).sum(1))
    biases = sum(head.bias for head in potential.net.heads).double() * HEAD_UNIT * batch.topology.num_atoms
    assert_close(potential([batch])[0].energy.double(), fitted + biases, rtol=0, atol=0.05)


def test_norm_of_five_components_is_that_of_the_tensor():
    batch = molecules.batch(molecules.real("C3H8"))
    graph = batch.topology.graph(batch.pos, 6.5)
    weight = torch.randn(graph.dist.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * graph.mask
    unit = graph.vec / graph.dist[..., None]
    tensor = unit[..., :, None] * unit[..., None, :] - torch.eye(3) / 3
    full = torch.einsum("ik,ikxy->ixy", weight, tensor).square().sum((1, 2))
    five = torch.einsum("ik,ikm->im", weight, hipnn.harmonics(graph, 2)[..., 4:]).square().sum(1)
    assert_close(five, full, rtol=1e-13, atol=0)
    assert full.min() > 1e-3


def test_interaction_is_its_defining_sum():
    """The factored form against the plain triple sum over neighbours, sensitivities and features, 3 x 3 tensors."""
    potential = meaningful(Potential(Config(**SMALL), molecules.spec(), seed=1))
    layer = potential.net.blocks[1][0].base
    batch = molecules.batch(molecules.real("C2H6O1", slice(0, 2)))
    graph = batch.topology.graph(batch.pos, 6.5)
    z = torch.randn(18, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = hipnn.sensitivities(graph.dist, layer.mu, layer.sigma) * hipnn.cosine_cutoff(graph, 6.5)[..., None]
    zj = z.reshape(2, 1, 9, 6).expand(2, 9, 9, 6).reshape(18, 9, 6)
    m = torch.einsum("vab,ikv,ikb->ika", layer.weight, s, zj)
    unit = graph.vec / graph.dist[..., None]
    tensor = unit[..., :, None] * unit[..., None, :] - torch.eye(3) / 3
    m1 = torch.einsum("ika,ikx->iax", m, unit).square().sum(-1)
    m2 = torch.einsum("ika,ikxy->iaxy", m, tensor).square().sum((-1, -2))
    expected = m.sum(1) + layer.scales[0] * (m1 + 1e-6).sqrt() + layer.scales[1] * (m2 + 1e-6).sqrt() + layer.own(z)
    angular = hipnn.harmonics(graph, 2) * hipnn.cosine_cutoff(graph, 6.5)[..., None]
    assert_close(layer(z, graph, angular), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reach", [None, 6.5], ids=["dense", "list"])
def test_both_orders_of_summation_agree(monkeypatch, reach):
    """With ethanol stretched: some of its atoms lie beyond the cutoff of others; and for a single atom."""
    numbers, pos = molecules.real("C2H6O1")[0]
    batches = [
        molecules.batch(structures, reach=reach)
        for structures in ([(numbers, pos), (numbers, 4 * pos)], [(numbers[:1], pos[:1])])
    ]
    results = []
    for first in (True, False):
        monkeypatch.setattr(hipnn, "sums_first", lambda *_, first=first: first)
        potential = meaningful(Potential(Config(**SMALL), molecules.spec(), seed=1))
        predictions = potential(batches)
        loss = sum(p.energy.square().sum() + p.forces.square().sum() for p in predictions)
        gradients = torch.autograd.grad(loss, list(potential.parameters()))
        results.append([x for p in predictions for x in (p.energy, p.forces)] + list(gradients))
    for a, b in zip(*results, strict=True):
        assert_close(a, b, rtol=1e-11, atol=1e-11 * max(1.0, a.abs().max().item()))
    assert results[0][1].abs().max() > 0.05


def test_the_order_of_summation():
    """Sums first: where the elements are few. Weights first: for triatomics and for hidden features."""
    first, second = (20, 128, 4), (20, 128, 128)
    assert hipnn.sums_first(first, K=14, M=9) and hipnn.sums_first(first, K=3, M=1)
    assert not hipnn.sums_first(first, K=3, M=9) and not hipnn.sums_first(second, K=60, M=9)


def test_without_tensor_scales_order_two_is_order_zero():
    two = meaningful(Potential(Config(lmax=2, **SMALL), molecules.spec(), seed=1))
    zero = Potential(Config(lmax=0, **SMALL), molecules.spec(), seed=1).double().train()
    state = two.state_dict()
    zero.load_state_dict({name: x for name, x in state.items() if ".scales." not in name})
    batch = molecules.batch(molecules.real("C2H6O1", slice(0, 2)))
    assert not torch.allclose(two([batch])[0].energy, zero([batch])[0].energy, rtol=1e-3)
    with torch.no_grad():
        for block in two.net.blocks:
            for scale in block[0].base.scales:
                scale.zero_()
    assert_close(two([batch])[0].energy, zero([batch])[0].energy, rtol=1e-13, atol=1e-13)
    assert_close(two([batch])[0].forces, zero([batch])[0].forces, rtol=1e-12, atol=1e-12)


def test_a_level_does_not_touch_the_heads_of_another():
    potential = meaningful(Potential(Config(**SMALL), molecules.spec(), seed=1))
    prediction = potential([molecules.batch(molecules.real("C2H6O1", slice(0, 2)))])[0]
    loss = prediction.energy[:, 0].square().sum() + prediction.forces[:, 0].square().sum()
    loss.backward()
    for head in potential.net.heads:
        assert head.weight.grad[0].abs().min() > 0
        assert not head.weight.grad[1].any() and not head.bias.grad[1].any()
    assert potential.net.blocks[0][0].base.weight.grad.abs().max() > 0


def test_levels_of_equal_heads_agree():
    potential = meaningful(Potential(Config(**SMALL), molecules.spec(), seed=1))
    with torch.no_grad():
        for head in potential.net.heads:
            head.weight[1], head.bias[1] = head.weight[0], head.bias[0]
        potential.net.offset.e0[1] = potential.net.offset.e0[0]
    prediction = potential([molecules.batch(molecules.real("C2H6O1", slice(0, 2)))])[0]
    assert torch.equal(prediction.energy[:, 0], prediction.energy[:, 1])
    assert torch.equal(prediction.forces[:, 0], prediction.forces[:, 1])


def test_difference_of_levels_that_differ_by_composition_is_exact():
    spec = molecules.spec()
    potential = meaningful(Potential(Config(**SMALL), spec, seed=1))
    with torch.no_grad():
        for head in potential.net.heads:
            head.weight[1], head.bias[1] = head.weight[0], head.bias[0]
    batch = molecules.batch(molecules.real("C2H6O1", slice(0, 2)))
    energy = potential([batch])[0].energy
    per_atom = torch.tensor(spec.residual[1] - spec.residual[0])[batch.species]
    assert_close(energy[:, 1] - energy[:, 0], batch.topology.sum_atoms(per_atom), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"soft_min": 6.0}, {"cutoff": 5.0}, {"features": 0}, {"lmax": 3}, {"cusp": 0.0}])
def test_contradictory_settings_are_refused(wrong):
    with pytest.raises(ValidationError, match=r"soft_max|greater|0, 1 or 2"):
        Config(**wrong)


def test_config_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Config().features = 3
