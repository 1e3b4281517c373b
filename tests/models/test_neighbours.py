"""Neighbour lists against those of ASE, another implementation; cells of all kinds."""

import ase.neighborlist
import molecules
import numpy as np
import pytest
import torch

from hpcmlip import lattice
from hpcmlip.graph import DenseTopology, ListTopology
from hpcmlip.neighbours import neighbour_lists, topology

CELLS = {
    "cubic": 12.9 * np.eye(3),
    "skewed": molecules.CELL,
    "flat": np.array([[3.0, 0.0, 0.0], [1.4, 2.8, 0.0], [0.2, -0.3, 2.5]]),
    "left_handed": np.array([[0.0, 4.0, 0.3], [4.2, 0.0, 0.0], [0.1, 0.0, 3.7]]),
}
PERIODIC = {"all": (True, True, True), "slab": (True, True, False), "wire": (False, True, False)}


def edges_of(lists: ListTopology, pos: np.ndarray) -> set[tuple]:
    graph = lists.graph(torch.tensor(pos), lists.reach)
    slots = graph.mask.nonzero().tolist()
    rounded = graph.vec.numpy().round(6) + 0.0
    return {(i, int(lists.neighbours[i, k]), *rounded[i, k]) for i, k in slots}


@pytest.mark.parametrize("pbc", PERIODIC)
@pytest.mark.parametrize("cell", CELLS)
def test_the_edges_are_those_of_ase(cell, pbc):
    rng, reach = np.random.default_rng(3), 5.2
    pos = (rng.random((6, 3)) * 3 - 1) @ CELLS[cell]  # inside and outside of the cell
    lists = neighbour_lists(pos[None], reach, cell=CELLS[cell][None], pbc=np.array([PERIODIC[pbc]]))
    i, j, vec = ase.neighborlist.primitive_neighbor_list("ijD", PERIODIC[pbc], CELLS[cell], pos, reach)
    expected = {(int(a), int(b), *v) for a, b, v in zip(i, j, vec.round(6) + 0.0, strict=True)}
    assert edges_of(lists, pos) == expected and len(expected) == len(i) > 0


def test_every_edge_has_its_reverse():
    (_, pos), cell = molecules.crystal()
    lists = neighbour_lists(pos[None], 6.0, cell=cell[None], pbc=np.ones((1, 3), dtype=bool))
    graph = lists.graph(torch.tensor(pos), 6.0)
    assert torch.equal(graph.swap(graph.vec)[graph.mask], -graph.vec[graph.mask])
    flat = lists.reverse.flatten()
    assert torch.equal(flat[flat], torch.arange(len(flat)))
    image_of_itself = (lists.neighbours == torch.arange(3)[:, None]) & lists.valid
    assert image_of_itself.any()


def test_a_missing_lattice_vector_is_needed_only_where_it_repeats():
    pos, cell = np.zeros((1, 1, 3)), np.zeros((1, 3, 3))
    cell[0, :2, :2] = [[2.5, 0.0], [1.0, 2.5]]
    lists = neighbour_lists(pos, 2.6, cell=cell, pbc=np.array([[True, True, False]]))
    assert int(lists.valid.sum()) == 2
    assert torch.linalg.det(lists.cell)[0].abs() == pytest.approx(6.25)
    with pytest.raises(ValueError, match="no volume"):
        neighbour_lists(pos, 2.6, cell=cell, pbc=np.ones((1, 3), dtype=bool))


def test_the_form_follows_from_size_and_period():
    small, large = np.zeros((2, 64, 3)), np.random.default_rng(0).random((1, 65, 3)) * 20
    assert isinstance(topology(small, 5.0), DenseTopology)
    assert isinstance(topology(large, 5.0), ListTopology)
    pbc = np.array([[False] * 3, [True] * 3])
    mixed = topology(small[:, :1], 3.0, cell=np.stack([4 * np.eye(3)] * 2), pbc=pbc)
    assert isinstance(mixed, ListTopology) and not mixed.valid.any()


def test_a_model_that_looks_further_than_the_lists_is_refused():
    lists = neighbour_lists(np.zeros((1, 1, 3)), 3.0)
    with pytest.raises(ValueError, match=r"reach 3.0 Å, the model asks for 5.0 Å"):
        lists.graph(torch.zeros(1, 3), 5.0)


def test_atoms_far_outside_the_cell_keep_their_neighbours():
    """As after a long unwrapped trajectory: steps beyond what a byte holds."""
    pos = np.array([[[0.0, 0, 0], [1.0, 1.0, 1.0]]])
    cell, pbc = 4.0 * np.eye(3)[None], np.ones((1, 3), dtype=bool)
    moved = pos + np.array([[0.0, 0, 0], [800.0, -40000.0, 4.0]])
    near, far = (neighbour_lists(x, 5.0, cell=cell, pbc=pbc) for x in (pos, moved))
    distances = [lists.graph(torch.tensor(x[0]), 5.0).dist.sort().values for lists, x in ((near, pos), (far, moved))]
    assert torch.allclose(*distances, atol=1e-9)


@pytest.mark.parametrize("edges", [(5.0, 1600.0, 1600.0), (1.5, 1500.0, 15000.0), (5.0, 5.0, 15000.0)])
def test_flat_and_needle_like_cells(edges):
    """Of which vesin's search by itself ends the process."""
    pos, cell, pbc = np.random.default_rng(4).random((3, 3)) * 1.4, np.diag(edges), np.ones(3, dtype=bool)
    lists = neighbour_lists(pos[None], 5.0, cell=cell[None], pbc=pbc[None])
    short = np.diag([edges[0], min(edges[1], 40.0), 40.0])  # its images are out of reach too
    expected = neighbour_lists(pos[None], 5.0, cell=short[None], pbc=pbc[None])
    assert edges_of(lists, pos) == edges_of(expected, pos) and int(lists.valid.sum()) > 0
    nearest = lattice.nearest_distances(pos[None], cell[None], pbc[None], 1.0)
    assert nearest == lattice.nearest_distances(pos[None], short[None], pbc[None], 1.0)
