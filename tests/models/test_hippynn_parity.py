"""The numbers of hippynn, with its weights: energies, forces and hierarchicality in float64."""

import warnings

import molecules
import pytest
import torch
from torch.testing import assert_close

from hpcmlip.errors import DataError
from hpcmlip.models.hipnn import Config
from hpcmlip.models.hippynn_state import load_hippynn_state
from hpcmlip.models.potential import Potential
from hpcmlip.training import hierarchicality
from hpcmlip.units import KCAL_PER_MOL

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    hippynn = pytest.importorskip("hippynn", reason="hippynn 0.1.3 is not installed")
    from hippynn.layers.targets import HEnergy
    from hippynn.networks.hipnn import Hipnn, HipnnQuad, HipnnVec

LEVELS = ("low", "high")
BLOCKS = [
    molecules.batch(molecules.real("C2H6O1", slice(0, 3))),
    molecules.batch(molecules.real("C2H3N1", slice(0, 2))),
    molecules.batch(molecules.real("H2O1", slice(0, 4))),
]


@pytest.fixture(autouse=True)
def plain_kernels():
    # the numba kernels drop sensitivities below 1e-10, no reference to 1e-12; those named "pytorch" need a compiler
    active = hippynn.custom_kernels.CUSTOM_KERNELS_ACTIVE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hippynn.custom_kernels.set_custom_kernels("_pytorch_raw")
        yield
        hippynn.custom_kernels.set_custom_kernels(active)


def reference(lmax: int, resnet: bool, seed: int = 0):
    """A hippynn network and an energy head a level, float64, heads not damped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cls = (Hipnn, HipnnVec, HipnnQuad)[lmax]
        network = cls(12, 20, 0.75, 5.5, 6.5, 3, 2, [0, *molecules.ELEMENTS], resnet=resnet).double()
        heads = [HEnergy(network.feature_sizes).double() for _ in LEVELS]
    return network, heads


def ours(lmax, resnet, network, heads) -> Potential:
    potential = Potential(Config(lmax=lmax, resnet=resnet, features=12), molecules.spec(LEVELS), seed=9)
    potential = potential.double().train()
    load_hippynn_state(potential.net, network.state_dict(), [head.state_dict() for head in heads])
    return potential


def pairs(blocks):
    """Positions of all blocks as one flat system, pairs nearer than 6.5 Å, and the structure of each atom."""
    pos = torch.cat([block.pos for block in blocks]).requires_grad_()
    structure, start = [], 0
    for block in blocks:
        index = torch.arange(block.num_structures) + start
        structure.append(block.topology.lift_structures(index))
        start += block.num_structures
    structure = torch.cat(structure)
    near = (torch.cdist(pos, pos) < 6.5) & (structure[:, None] == structure[None, :])
    first, second = near.fill_diagonal_(False).nonzero(as_tuple=True)
    return pos, first, second, structure


def evaluate(network, head, blocks, lmax):
    """(energy [B], forces [A, 3], hierarchicality: atom [B], molecule [B], batch) of hippynn, kcal/mol."""
    pos, first, second, structure = pairs(blocks)
    species = torch.cat([block.species for block in blocks])
    vec = pos[second] - pos[first]
    extra = [vec] if lmax else []
    features = network(torch.nn.functional.one_hot(species, 4), first, second, vec.norm(dim=1), *extra)
    out = head(features, structure, int(structure.max()) + 1)
    energy, hierarchy = out[0][:, 0], (out[3][:, 0], out[5][:, 0], out[6])
    forces = -torch.autograd.grad(energy.sum(), pos)[0]
    return energy, forces, hierarchy


@pytest.mark.parametrize("resnet", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("lmax", [0, 1, 2])
def test_energies_forces_and_hierarchicality(lmax, resnet):
    network, heads = reference(lmax, resnet)
    prediction = ours(lmax, resnet, network, heads)(BLOCKS)
    energy = torch.cat([p.energy for p in prediction]) / KCAL_PER_MOL
    forces = torch.cat([p.forces for p in prediction]) / KCAL_PER_MOL
    for level, head in enumerate(heads):
        expected_energy, expected_forces, hierarchy = evaluate(network, head, BLOCKS, lmax)
        scale = expected_forces.abs().max().item()
        assert scale > 0.1
        assert_close(energy[:, level], expected_energy, rtol=1e-12, atol=1e-12)
        assert_close(forces[:, level], expected_forces, rtol=0, atol=1e-12 * max(1.0, scale))
        for variant, expected in zip(("atom", "molecule", "batch"), hierarchy, strict=True):
            parts = [hierarchicality.sums(b, p, variant) for b, p in zip(BLOCKS, prediction, strict=True)]
            value = hierarchicality.value(sum(parts))[level]
            assert_close(value, expected.mean(), rtol=1e-12, atol=0)


def test_a_changed_weight_changes_the_energy():
    network, heads = reference(2, True)
    potential = ours(2, True, network, heads)
    for name, weight in network.state_dict().items():
        if name.endswith("_extra_state"):
            continue
        state = network.state_dict() | {name: weight * 1.01}
        before = potential([BLOCKS[0]])[0].energy
        load_hippynn_state(potential.net, state, [head.state_dict() for head in heads])
        assert not torch.equal(before, potential([BLOCKS[0]])[0].energy), f"{name} is not used"


def test_a_state_that_does_not_fit_is_refused():
    network, heads = reference(2, True)
    potential = ours(2, True, network, heads)
    states = [head.state_dict() for head in heads]
    state = dict(network.state_dict())
    with pytest.raises(DataError, match="expected the state of 2 energy heads"):
        load_hippynn_state(potential.net, state, states[:1])
    with pytest.raises(DataError, match="has no place"):
        load_hippynn_state(potential.net, state | {"blocks.5.x": torch.ones(1)}, states)
    with pytest.raises(DataError, match="has shape"):
        load_hippynn_state(potential.net, state | {"blocks.0.0.base_layer.vecscales": torch.ones(3)}, states)
    del state["blocks.1.0.base_layer.quadscales"]
    with pytest.raises(DataError, match=r"lacks 'blocks\.1\.0\.base_layer\.quadscales'"):
        load_hippynn_state(potential.net, state, states)
