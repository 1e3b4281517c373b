"""Operations of message passing against plain loops over atoms and neighbours."""

import molecules
import pytest
import torch
from torch.testing import assert_close

B, N, CUTOFF = 2, 9, 2.5


@pytest.fixture(scope="module")
def batch():
    return molecules.batch(molecules.real("C2H6O1", slice(0, B)))


@pytest.fixture(scope="module")
def graph(batch):
    graph = batch.topology.graph(batch.pos, CUTOFF)
    assert graph.mask.any() and not graph.mask.all(1).any()  # this cutoff leaves some pairs out
    return graph


def sender(receiver: int, slot: int) -> int:
    return receiver // N * N + slot


def edges():
    return [(i, k) for i in range(B * N) for k in range(N)]


def values(*shape):
    return torch.randn(B * N, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_geometry(batch, graph):
    for i, k in edges():
        vec = batch.pos[sender(i, k)] - batch.pos[i]
        real = sender(i, k) != i and bool(vec.norm() < CUTOFF)
        assert graph.mask[i, k] == real
        assert_close(graph.vec[i, k], vec if real else torch.tensor([1.0, 0, 0], dtype=torch.float64))
        assert_close(graph.dist[i, k], graph.vec[i, k].norm())


def test_lift(graph):
    x = values(3)
    lifted = graph.lift(x)
    assert all(torch.equal(lifted[i, k], x[sender(i, k)]) for i, k in edges())
    assert graph.lift(x[:, 0]).shape == (B * N, N)


def test_swap(graph):
    e = values(N, 3)
    swapped = graph.swap(e)
    assert all(torch.equal(swapped[i, k], e[sender(i, k), i % N]) for i, k in edges())
    assert torch.equal(graph.swap(graph.dist), graph.dist) and torch.equal(graph.swap(swapped), e)


def test_sum_and_contract(graph):
    e, weights = values(N, 3), values(N, 4) * graph.mask[..., None]
    summed, outer = graph.sum(e), graph.contract(weights, e)
    for i in range(B * N):
        near = [k for k in range(N) if graph.mask[i, k]]
        assert_close(summed[i], sum((e[i, k] for k in near), torch.zeros(3, dtype=torch.float64)))
        assert_close(outer[i], torch.einsum("km,kf->mf", weights[i], e[i]))


def test_softmax(graph):
    e = 50 * values(N, 3)
    weight = graph.softmax(e)
    for i in range(B * N):
        near = graph.mask[i]
        assert_close(weight[i, near], torch.softmax(e[i, near], dim=0))
        assert not weight[i, ~near].any()


def test_softmax_without_neighbours_is_zero():
    lone = molecules.batch([molecules.ideal()["single_atom"]])
    graph = lone.topology.graph(lone.pos, CUTOFF)
    e = torch.ones(1, 1, 2, dtype=torch.float64, requires_grad=True)
    weight = graph.softmax(e)
    assert not weight.any()
    assert not torch.autograd.grad(weight.sum(), e)[0].any()


def test_derivatives_of_softmax(graph):
    small = molecules.batch(molecules.real("H2O1"))
    water = small.topology.graph(small.pos, CUTOFF)
    e = torch.randn(3, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(water.softmax, (e,)) and torch.autograd.gradgradcheck(water.softmax, (e,))


def test_structures(batch):
    x = values(2)
    total = batch.topology.sum_atoms(x)
    assert_close(total, torch.stack([x[b * N : (b + 1) * N].sum(0) for b in range(B)]))
    lifted = batch.topology.lift_structures(total)
    assert all(torch.equal(lifted[i], total[i // N]) for i in range(B * N))
