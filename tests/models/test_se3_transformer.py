"""SE(3)-Transformer: tensors of every layer turn with the molecule, kernels are those of Clebsch-Gordan."""

import math

import molecules
import numpy as np
import pytest
import torch
from e3nn import o3
from pydantic import ValidationError
from torch.testing import assert_close

from hpcmlip.models.layers import bump_cutoff
from hpcmlip.models.potential import Potential
from hpcmlip.models.se3_transformer import Config, Edges, Net, NormNonlinearity, attention_weights, bessel_functions
from hpcmlip.models.tensors import EdgeFrames, EdgeKernel, edge_components

SMALL = {"channels": 4, "heads": 2, "radial_hidden": 6, "radial_functions": 4}
DEFAULT_SIZE = {name: Config.model_fields[name].default for name in SMALL}
MOLECULES = molecules.real("C2H6O1", slice(0, 2))


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def net(seed=0, dtype=torch.float64, **settings) -> Net:
    torch.manual_seed(seed)
    return Net(Config(**SMALL | settings), molecules.spec()).to(dtype)


def potential(seed=3, **settings) -> Potential:
    """Float64, with heads that are not damped."""
    found = Potential(Config(**SMALL | settings), molecules.spec(), seed=seed).double().train()
    with torch.no_grad():
        for parameter in found.net.energy.parameters():
            parameter.mul_(100)
    return found


def graph_of(mols, cutoff=5.0, **options):
    batch = molecules.batch(mols, **options)
    return batch, batch.topology.graph(batch.pos, cutoff)


def harmonics(ell, directions):
    """[P, 2l + 1] of directions [P, 3]."""
    return o3.spherical_harmonics(ell, directions, normalize=True, normalization="component")


def turn_of_degree(ell, rotation):
    """[2l + 1, 2l + 1]: how tensors of the degree turn, from harmonics of random points."""
    points = normal(40, 3)
    return torch.linalg.lstsq(harmonics(ell, points), harmonics(ell, points @ rotation.T)).solution.T


def degree_of(features):
    return math.isqrt(features.shape[1]) - 1


# ---------------------------------------------------------------------------------------------------- equivariance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    "settings",
    [{"max_degree": 3}, {"parity": True}, {"self_interaction": "attentive", "forces": "direct"}],
    ids=["degree3", "parity", "attentive"],
)
def test_features_of_every_layer_turn_with_the_molecule(settings, dtype, tolerance):
    rotation = molecules.rotation(3)
    turned = [(numbers, pos @ rotation.numpy().T) for numbers, pos in MOLECULES]
    model = net(dtype=dtype, **DEFAULT_SIZE | settings)
    found = []
    for mols in (MOLECULES, turned):
        batch, graph = graph_of(mols, dtype=dtype)
        found.append([x.detach().double() for x in model.features(batch.species, graph)])
    for before, after in zip(*found, strict=True):
        for ell in range(degree_of(before) + 1):
            part = slice(ell * ell, (ell + 1) ** 2)
            expected = torch.einsum("mn,anc->amc", turn_of_degree(ell, rotation), before[:, part])
            assert expected.norm() > 1e-2
            assert (after[:, part] - expected).norm() < tolerance * expected.norm(), f"degree {ell}"


def test_nonlinearity_turns_and_is_smooth_at_zero():
    rotation, module = molecules.rotation(4), NormNonlinearity(2, 4).double()
    x = normal(5, 9, 4)
    turn = torch.block_diag(*(turn_of_degree(ell, rotation) for ell in range(3)))
    assert_close(module(turn @ x), turn @ module(x), rtol=0, atol=1e-13)
    # around zero it is nearly linear: a division by the norm would not be
    x[:, 1:] *= 1e-4
    there, back = module(x), module(torch.cat([x[:, :1], -x[:, 1:]], dim=1))
    assert_close(there[:, 1:], -back[:, 1:], rtol=1e-12, atol=0)
    assert (there[:, 1:].norm(dim=1) < x[:, 1:].norm(dim=1)).all()
    zero = torch.zeros(5, 9, 4, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(module(zero).sum(), zero)[0]).all()


# ---------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_frames_are_rotations_whose_axis_is_the_edge(degree):
    _, graph = graph_of(MOLECULES, 3.0)
    own = EdgeFrames(degree)(graph).own
    M = (degree + 1) ** 2
    assert_close(own.transpose(2, 3) @ own, torch.eye(M, dtype=torch.float64).expand_as(own), rtol=0, atol=1e-13)
    for row, (ell, m) in enumerate(edge_components(degree, degree)):
        part = own[..., row, ell * ell : (ell + 1) ** 2]
        assert_close(part.norm(dim=-1), torch.ones_like(graph.dist))
        if m == 0:
            assert_close(part * math.sqrt(2 * ell + 1), harmonics(ell, graph.vec), rtol=0, atol=1e-13)


@pytest.mark.parametrize("reach", [None, 3.5], ids=["dense", "lists"])
def test_neighbours_are_seen_in_the_frame_of_the_edge_to_them(reach):
    batch, graph = graph_of(MOLECULES, 3.0, **({} if reach is None else {"reach": reach}))
    frames, x = EdgeFrames(3)(graph), normal(len(batch.pos), 16, 2)
    expected = torch.einsum("aknm,akmc->aknc", frames.own, graph.lift(x))
    found = frames.turn_neighbours(x, 3)
    assert_close(found[graph.mask], expected[graph.mask], rtol=0, atol=1e-12)
    assert graph.mask.sum() > 20


DIRECTIONS = {
    **{f"{sign}{axis}": (1 if sign == "+" else -1) * np.eye(3)[i] for sign in "+-" for i, axis in enumerate("xyz")},
    "where_frames_change": np.array([0.75, math.sqrt(1 - 0.75**2), 0]),
    "where_frames_change_beyond": np.array([0.75 + 1e-9, 0, -math.sqrt(1 - (0.75 + 1e-9) ** 2)]),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_no_direction_is_special(direction):
    model = potential()
    bent = np.array([[0.0, 0, 0], [1.2, 0.1, 0.3], [-0.5, 0.9, 0.2]])

    def along(axis):
        # a molecule whose first bond points along the axis, and the loss of its forces
        frame, _ = np.linalg.qr(np.column_stack([bent[1], bent[2], [0.3, 0.2, 1.0]]))
        target, _ = np.linalg.qr(np.column_stack([axis, [0.36, 0.48, -0.8], [0.1, -0.7, 0.3]]))
        q = target @ np.diag([1, 1, np.linalg.det(target) * np.linalg.det(frame)]) @ frame.T
        prediction = model([molecules.batch([([6, 8, 1], bent @ q.T)])])[0]
        slope = torch.autograd.grad(prediction.forces.square().sum(), model.net.attention[0].query.weight)[0]
        return prediction.energy.detach(), prediction.forces.detach() @ torch.tensor(q), slope

    for found, expected in zip(along(DIRECTIONS[direction]), along(np.array([0.48, 0.6, 0.64])), strict=True):
        assert_close(found, expected, rtol=1e-10, atol=1e-12)


# --------------------------------------------------------------------------------------------------------- kernels


def kernels(k, ell, *, even, number, directions=5):
    """[number, directions, 2l + 1, 2k + 1] of random weights, on the first edges of a molecule; and the directions."""
    _, graph = graph_of(MOLECULES[:1])
    frames = EdgeFrames(max(k, ell))(graph)
    degree, rows = max(k, ell), edge_components(max(k, ell), max(k, ell))
    torch.manual_seed(0)
    found = torch.zeros(number, directions, 2 * ell + 1, 2 * k + 1, dtype=torch.float64)
    for n in range(number):
        module = EdgeKernel(degree, (degree,), 1, even=even).double()
        radial = torch.ones(1, 1, module.num_radial, 1, dtype=torch.float64)
        for edge in range(directions):
            turn = frames.own[0, edge + 1]
            (seen,) = module(turn.T[:, None, :, None], radial.expand(len(rows), -1, -1, -1))
            whole = turn.T @ seen[:, 0, :, 0].T  # from all degrees to all degrees
            found[n, edge] = whole[ell * ell : (ell + 1) ** 2, k * k : (k + 1) ** 2].detach()
    return found, graph.vec[0, 1 : directions + 1]


def clebsch_gordan(k, ell, J, directions):
    """[P, 2l + 1, 2k + 1]: the path of e3nn's tensor product with harmonics of degree J."""
    product = o3.TensorProduct(
        [(1, (k, 1))], [(1, (J, 1))], [(1, (ell, 1))], [(0, 0, 0, "uuu", False)], irrep_normalization="norm"
    ).double()
    basis = torch.eye(2 * k + 1, dtype=torch.float64)
    y = harmonics(J, directions)
    return torch.stack([product(basis, y[p].expand(2 * k + 1, -1)).T for p in range(len(directions))])


@pytest.fixture
def double_precision():
    """e3nn makes the constants of a tensor product in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("even", [False, True], ids=["all", "even"])
@pytest.mark.parametrize(("k", "ell"), [(k, ell) for k in range(4) for ell in range(4)])
def test_kernels_are_all_combinations_of_clebsch_gordan(k, ell, even, double_precision):
    paths = [J for J in range(abs(k - ell), k + ell + 1) if not (even and (J + k + ell) % 2)]
    found, directions = kernels(k, ell, even=even, number=len(paths) + 1)
    basis = torch.stack([clebsch_gordan(k, ell, J, directions) for J in paths]).flatten(1)
    solution = torch.linalg.lstsq(basis.T, found.flatten(1).T).solution
    assert_close(solution.T @ basis, found.flatten(1), rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(found.flatten(1), rtol=1e-6) == len(paths)


# ------------------------------------------------------------------------------------------------------- attention


def test_attention_weights_are_a_softmax_with_envelope():
    logits, envelope = 3 * normal(4, 6, 2), normal(4, 6, seed=2).abs()
    envelope[1, 2] = 0
    found = attention_weights(logits, envelope)
    weighted = envelope[..., None] * torch.exp(logits)
    assert_close(found, weighted / (1 + weighted.sum(1, keepdim=True)))
    assert not found[1, 2].any()
    assert (found.sum(1) < 1).all()
    large = attention_weights(logits + 40, envelope)
    assert_close(large.sum(1), torch.ones(4, 2, dtype=torch.float64))


def test_attention_weights_of_large_logits_are_finite():
    logits = torch.tensor([[[200.0], [-200.0], [900.0]], [[-300.0], [-200.0], [-900.0]]], requires_grad=True)
    envelope = torch.tensor([[1e-30, 1.0, 1e-36], [1.0, 1.0, 0.0]], requires_grad=True)
    weights = attention_weights(logits, envelope)
    assert torch.isfinite(weights).all() and (weights.sum(1) <= 1).all()
    slopes = torch.autograd.grad((weights * normal(2, 3, 1).float()).sum(), [logits, envelope], create_graph=True)
    curvatures = torch.autograd.grad(slopes[0].square().sum(), [logits, envelope])
    assert all(torch.isfinite(x).all() for x in (*slopes, *curvatures))


def test_derivatives_of_attention_weights():
    logits = normal(2, 3, 2).requires_grad_()
    envelope = torch.tensor([[0.5, 1.0, 0.2], [0.3, 0.0, 0.7]], dtype=torch.float64)
    assert torch.autograd.gradcheck(attention_weights, (logits, envelope))
    assert torch.autograd.gradgradcheck(attention_weights, (logits, envelope))


def test_a_neighbour_fades_at_the_cutoff():
    batch, graph = graph_of([([6, 1, 8], np.array([[0.0, 0, 0], [1.1, 0, 0], [-4.9, 0, 0]]))])
    model = net()
    with torch.no_grad():
        near = model.features(batch.species, graph)[0]
        (pair,) = [([6, 1], np.array([[0.0, 0, 0], [1.1, 0, 0]]))]
        without = model.features(batch.species[:2], graph_of([pair])[1])[0]
    assert graph.mask[0, 2]
    assert_close(near[:2], without, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_neighbour_of_large_logit_fades_with_the_envelope(sign):
    model = net()
    layer = model.attention[0]
    with torch.no_grad():
        layer.query.weight *= 1e4 * sign

    def message(distance):
        _, graph = graph_of([([6, 1], np.array([[0.0, 0, 0], [distance, 0, 0]]))])
        x = normal(2, 1, 4)
        edges = Edges(model.frames(graph), bessel_functions(graph.dist, 5.0, 4), bump_cutoff(graph, 5.0))
        return layer.messages(x, edges).detach().abs().max(), edges.envelope[0, 1]

    (near, _), (far, envelope) = message(2.0), message(4.3)
    assert 1e-6 < envelope < 1e-3 and near > 1e-2
    assert far < 10 * envelope * near


# ---------------------------------------------------------------------------------------------------------- forces


def test_direct_forces_are_no_gradient():
    model = potential(forces="direct", parity=True)
    assert not model.is_conservative and set(model.config.limits) == {"conservative"}
    batch = molecules.batch(MOLECULES)
    pos = batch.pos.clone().requires_grad_()
    terms, forces = model.net(batch.species, batch.topology.graph(pos, 5.0))
    gradient = torch.autograd.grad(terms[..., 0].sum(), pos)[0]
    assert forces.shape == (len(pos), 2, 3) and forces.square().mean().sqrt() > 1e-3
    assert (forces[:, 0] + gradient).norm() > 0.1 * gradient.norm()


def test_mean_force_can_be_removed():
    plain, centered = (potential(forces="direct", remove_mean_force=remove) for remove in (False, True))
    batch = molecules.batch(MOLECULES)
    forces, rest = (model([batch])[0].forces.detach() for model in (plain, centered))
    mean = batch.topology.sum_atoms(forces) / 9
    assert mean.abs().max() > 1e-4
    assert_close(rest, forces - batch.topology.lift_structures(mean))
    # then molecules far apart are not independent, as the model states
    assert "additivity" in centered.config.limits and "additivity" not in plain.config.limits
    one, two = molecules.real("H2O1")[0], molecules.real("C1H4")[0]
    pair = (np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1] + np.array([100.0, 0, 0])]))
    alone = torch.cat([centered([molecules.batch([mol])])[0].forces for mol in (one, two)])
    assert (centered([molecules.batch([pair])])[0].forces - alone).norm() > 1e-3 * alone.norm()


# ---------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize(
    ("settings", "differs"),
    [({}, True), ({"parity": True}, False), ({"max_degree": 0}, False), ({"layers": 1}, False)],
    ids=["all_paths", "even_paths", "scalars", "one_layer"],
)
def test_mirror_images(settings, differs):
    model = potential(**settings)
    mirrored = [(numbers, pos * np.array([1.0, 1, -1])) for numbers, pos in MOLECULES]
    energy, image = (model([molecules.batch(mols)])[0].energy.detach() for mols in (MOLECULES, mirrored))
    assert ((energy - image).abs().max() > 1e-6) == differs
    assert ("reflection" in model.config.limits) == differs


# ---------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": 6, "heads": 4}, "cannot be divided"),
        ({"forces": "direct", "max_degree": 0}, "needs tensors of degree 1"),
        ({"remove_mean_force": True}, "goes with forces: direct"),
        ({"max_degree": 4}, "less than or equal to 3"),
    ],
)
def test_impossible_settings(settings, message):
    with pytest.raises(ValidationError, match=message):
        Config(**settings)
