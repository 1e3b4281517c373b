"""Operations of message passing against plain loops over atoms and neighbours."""

import molecules
import pytest
import torch
from torch.testing import assert_close

from hpcmlip.graph import ListTopology

B, N, CUTOFF = 2, 9, 2.5


@pytest.fixture(scope="module", params=["dense", "list"])
def batch(request):
    return molecules.batch(
        molecules.real("C2H6O1", slice(0, B)), reach=CUTOFF + 0.3 if request.param == "list" else None
    )


@pytest.fixture(scope="module")
def graph(batch):
    graph = batch.topology.graph(batch.pos, CUTOFF)
    assert 0 < graph.mask.sum() < B * N * (N - 1)  # this cutoff leaves some pairs out
    return graph


@pytest.fixture(scope="module")
def senders(batch):
    """[A, K] flat index of the atom in each slot."""
    if isinstance(batch.topology, ListTopology):
        return batch.topology.neighbours
    return torch.arange(B * N).reshape(B, 1, N).expand(B, N, N).reshape(B * N, N)


@pytest.fixture(scope="module")
def edges(graph):
    """(receiver, slot) of every real edge."""
    return [tuple(edge) for edge in graph.mask.nonzero().tolist()]


def values(*shape):
    return torch.randn(B * N, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_geometry(batch, graph, senders, edges):
    found = {(i, int(senders[i, k])) for i, k in edges}
    near = {
        (i, j)
        for i in range(B * N)
        for j in range(i // N * N, i // N * N + N)
        if i != j and (batch.pos[j] - batch.pos[i]).norm() < CUTOFF
    }
    assert found == near and len(edges) == len(near)
    for i, k in edges:
        assert_close(graph.vec[i, k], batch.pos[senders[i, k]] - batch.pos[i])
    along_x = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    assert (graph.vec[~graph.mask] == along_x).all()
    assert_close(graph.dist, graph.vec.norm(dim=-1))


def test_lift(graph, senders, edges):
    x = values(3)
    lifted = graph.lift(x)
    assert all(torch.equal(lifted[i, k], x[senders[i, k]]) for i, k in edges)
    assert graph.lift(x[:, 0]).shape == graph.mask.shape


def test_swap(graph, senders, edges):
    K = graph.mask.shape[1]
    e = values(K, 3)
    swapped = graph.swap(e)
    back = {(i, int(senders[i, k])): k for i, k in edges}
    assert all(torch.equal(swapped[i, k], e[senders[i, k], back[int(senders[i, k]), i]]) for i, k in edges)
    assert torch.equal(graph.swap(graph.dist), graph.dist) and torch.equal(graph.swap(swapped), e)


@pytest.mark.parametrize("operation", ["lift", "swap", "sum"])
def test_derivatives(operation):
    small = molecules.batch(molecules.real("H2O1"), reach=CUTOFF)
    graph = small.topology.graph(small.pos, 1.5)  # the two hydrogens stay in the list but are not neighbours
    shape = (3, 2) if operation == "lift" else (*graph.mask.shape, 2)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    fn = getattr(graph, operation)
    assert torch.autograd.gradcheck(fn, (x,))
    assert torch.autograd.gradgradcheck(lambda x: fn(x) ** 2, (x,))


def test_sum_and_contract(graph):
    K = graph.mask.shape[1]
    e, weights = values(K, 3), values(K, 4) * graph.mask[..., None]
    summed, outer = graph.sum(e), graph.contract(weights, e)
    for i in range(B * N):
        near = [k for k in range(K) if graph.mask[i, k]]
        assert_close(summed[i], sum((e[i, k] for k in near), torch.zeros(3, dtype=torch.float64)))
        assert_close(outer[i], torch.einsum("km,kf->mf", weights[i], e[i]))


def test_structures(batch):
    x = values(2)
    total = batch.topology.sum_atoms(x)
    assert_close(total, torch.stack([x[b * N : (b + 1) * N].sum(0) for b in range(B)]))
    lifted = batch.topology.lift_structures(total)
    assert all(torch.equal(lifted[i], total[i // N]) for i in range(B * N))
