"""Grids of the far field: each atom is seen once, and the smooth kind has no jumps."""

import math

import molecules
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from hpcmlip.models.deeppot import Config
from hpcmlip.models.long_range import Cells, LongRange, Smooth, occupied_nodes, rise, shares, switch
from hpcmlip.models.potential import Potential

SPEC = molecules.spec()
FAR = {
    "cells": {"kind": "cells", "spacing": 1.05, "features": 6, "axis_features": 2},
    "smooth": {"kind": "smooth", "spacing": 1.2, "features": 6, "axis_features": 2},
}


def chain(num: int, seed: int = 0) -> molecules.Molecule:
    """A crooked chain of H, C, N, O with steps of 1.2 Å: wider than the grids."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(size=(num, 3)) + np.array([0.6, 0, 0])
    return rng.choice(molecules.ELEMENTS, num), np.cumsum(1.2 * steps / np.linalg.norm(steps, axis=1)[:, None], axis=0)


def cloud(num: int, width: float, seed: int) -> molecules.Molecule:
    """Atoms anywhere in a cube of `width` Å."""
    rng = np.random.default_rng(seed)
    return rng.choice(molecules.ELEMENTS, num), rng.uniform(0, width, size=(num, 3))


def potential(kind: str, cutoff: float = 2.5) -> Potential:
    """Float64, with weights far from the start."""
    config = Config.model_validate(
        {
            "cutoff": cutoff,
            "switch_width": 0.6,
            "features": 6,
            "axis_features": 3,
            "hidden": 24,
            "long_range": FAR[kind],
        }
    )
    built = Potential(config, SPEC, seed=1).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return built


def one_hot(batch):
    return torch.nn.functional.one_hot(batch.species, len(SPEC.elements)).double()


def others(batch):
    """[A, E]: all atoms of the structure but the atom itself, by element."""
    z = one_hot(batch)
    return batch.topology.lift_structures(batch.topology.sum_atoms(z)) - z


# ------------------------------------------------------------------------------------------------------------- cells


@pytest.mark.parametrize(("cutoff", "spacing"), [(4.41, 1.0), (5.41, 2.0), (3.41, 2.0), (4.0, 1.7)])
def test_each_other_atom_is_local_or_in_one_cell(cutoff, spacing):
    batch = molecules.batch([cloud(40, 1.6 * cutoff, seed) for seed in range(4)])
    grid = Cells(LongRange(kind="cells", spacing=spacing), SPEC, cutoff - 0.2, cutoff).double()
    graph, z = batch.topology.graph(batch.pos, cutoff), one_hot(batch)
    local = graph.mask & grid.is_local(graph)
    cells = grid(z, graph)
    stands = cells.rows[..., 0] > 0
    in_cells = (cells.content * stands[..., None]).sum(1)
    assert_close(in_cells + graph.contract(local.double()[..., None], graph.lift(z))[:, 0], others(batch))
    assert local.any() and stands.any()
    # cells at the corners of the block of l_max reach beyond the cutoff: their atoms are what the source lost
    index = grid.cell_index(graph)
    apart = (graph.lift(index) - index[:, None]).abs().amax(-1)
    lost = (apart < grid.shells) & (batch.topology.graph(batch.pos, 100.0).dist >= cutoff)
    assert lost.any() == (grid.shells > 1)


def test_pseudo_particles_of_the_source():
    """By loops over atoms and cells, straight from the definition."""
    spacing, shells, cutoff = 1.5, 3, (3 + math.sqrt(0.5)) * 1.5
    numbers, pos = chain(20)
    batch = molecules.batch([(numbers, pos)])
    grid = Cells(LongRange(kind="cells", spacing=spacing), SPEC, cutoff - 0.2, cutoff).double()
    graph = batch.topology.graph(batch.pos, cutoff)
    assert grid.shells == shells
    found = grid(one_hot(batch), graph)
    index = np.floor((pos - pos.min(axis=0)) / spacing)
    for i in range(len(pos)):
        cells = {}
        for j in range(len(pos)):
            apart = np.abs(index[j] - index[i]).max()
            if j != i and (apart > shells or np.linalg.norm(pos[j] - pos[i]) >= cutoff):
                cells.setdefault(tuple(index[j]), []).append(j)
        expected = []
        for members in cells.values():
            vec = np.average(pos[members], axis=0, weights=numbers[members]) - pos[i]
            r = np.linalg.norm(vec)
            expected.append([1 / r, *(vec / r), *(float(np.sum(numbers[members] == z)) for z in SPEC.elements)])
        rows = torch.cat([found.rows[i], found.content[i]], dim=1)[found.rows[i, :, 0] > 0]
        assert len(rows) == len(expected)
        np.testing.assert_allclose(sorted(rows.tolist()), sorted(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("cutoff", "spacing", "l_max"), [(7.71, 1.0, 6), (7.41, 2.0, 2), (11.41, 2.0, 4)])
def test_shells_of_the_source(cutoff, spacing, l_max):
    config = LongRange(kind="cells", spacing=spacing)
    assert Cells(config, SPEC, cutoff - 0.2, cutoff).shells == l_max + 1


# ------------------------------------------------------------------------------------------------------------ smooth


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_shares_add_up_to_what_is_not_local(levels):
    start, cutoff = 2.0, 3.0
    batch = molecules.batch([chain(25, seed) for seed in range(4)])
    grid = Smooth(LongRange(spacing=1.1, levels=levels), SPEC, start, cutoff)
    graph, z = batch.topology.graph(batch.pos, 1000.0), one_hot(batch)
    found = grid(z, graph)
    weights = found.rows[..., 0] / found.inverse
    far = torch.where(graph.mask, 1 - switch(graph.dist, start, cutoff), 0)
    assert_close(weights.sum(1), far.sum(1), rtol=1e-12, atol=1e-12)
    by_element = (found.content * (weights + 1e-4)[..., None]).sum(1)
    assert_close(by_element, graph.contract(far[..., None], graph.lift(z))[:, 0], rtol=1e-12, atol=1e-12)
    assert (weights >= -1e-15).all()


def test_windows_share_out_the_distances():
    grid = Smooth(LongRange(levels=3), SPEC, 4.0, 6.0)
    dist = torch.linspace(0, 40, 4001, dtype=torch.float64)
    windows = torch.stack(grid.windows(dist))
    assert_close(windows.sum(0), 1 - switch(dist, 4.0, 6.0), rtol=0, atol=1e-14)
    assert windows.min() >= 0
    # each has the next distances to itself: 6, 12 and from 24 Å on
    assert_close(torch.stack(grid.windows(torch.tensor([6.0, 12.0, 24.0, 99.0]))), torch.eye(3)[:, [0, 1, 2, 2]])


def test_weights_of_nodes_are_a_partition():
    u = 5 * torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = torch.ones(3, 40, dtype=torch.bool)
    wanted[0, 20:] = False
    wanted[2] = False
    node = occupied_nodes(u, wanted)
    weights = shares(u, node)
    assert_close(weights.sum(2)[wanted], torch.ones(60, dtype=torch.float64), rtol=0, atol=1e-14)
    assert node.shape[1] <= 8 * 40 and not weights[2].any()
    for b, count in enumerate((20, 40, 0)):
        wanted_nodes = {tuple(n) for x in u[b, :count] for n in (x.floor() + corners()).tolist()}
        occupied = [tuple(n) for n in node[b][weights[b].any(0)].tolist()]
        assert len(set(occupied)) == len(occupied) and set(occupied) >= wanted_nodes


def corners():
    return torch.cartesian_prod(*[torch.arange(2, dtype=torch.float64)] * 3)


def test_rise_is_smooth_at_its_ends():
    for x, value in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(rise(at), at, create_graph=True)
        (bend,) = torch.autograd.grad(slope, at)
        assert (rise(at).item(), slope.item(), bend.item()) == (value, 1.875 if x == 0.5 else 0.0, 0.0)


def test_a_far_atom_alone_does_not_feel_the_grid():
    """Two atoms in any orientation: their nodes differ, the sum over them does not."""
    built = potential("smooth")
    pair = ([6, 8], np.array([[0.0, 0, 0], [3.7, 0, 0]]))
    turned = [(pair[0], pair[1] @ molecules.rotation(seed).numpy().T) for seed in range(8)]
    energies = built([molecules.batch([pair, *turned])])[0].energy
    # up to what the bound of the division leaves in the nodes that share the least
    assert_close(energies, energies[:1].expand_as(energies), rtol=0, atol=1e-3)


# ------------------------------------------------------------------------------------------------- what a user notices


def roughness(kind: str, num_steps: int) -> float:
    """Largest |E(t + h) - E(t) - h (E'(t) + E'(t + h)) / 2| while an atom of propane is carried off by 3 Å.

    With the step h it falls as h² where E' has kinks at most, as h where E' jumps, and not at all where E jumps.
    """
    numbers, pos = molecules.real("C3H8")[0]
    direction, t = pos[-1] - pos.mean(axis=0), np.linspace(0, 1, num_steps + 1)
    direction *= 3 / np.linalg.norm(direction)
    path = [(numbers, np.vstack([pos[:-1], pos[-1:] + x * direction])) for x in t]
    prediction = potential(kind)([molecules.batch(path)])[0]
    energy, forces = prediction.energy, prediction.forces.unflatten(0, (len(t), -1))[:, -1]
    assert energy.std(0).min() > 1e-2
    slope = -forces @ torch.tensor(direction)
    return float((energy.diff(dim=0) - (slope[1:] + slope[:-1]) / (2 * num_steps)).abs().max())


def test_the_smooth_kind_has_no_jumps():
    assert roughness("smooth", 600) < roughness("smooth", 300) / 3


def test_cells_jump():
    assert roughness("cells", 600) > 0.9 * roughness("cells", 300) > 1e-3


def test_rotation_is_felt_less_by_the_smooth_kind():
    """Spread of the energies of 24 orientations, in parts of their spread over 24 distortions by 0.05 Å."""
    numbers, pos = molecules.real("C3H8")[0]
    distorted = pos + 0.05 * np.random.default_rng(0).normal(size=(24, *pos.shape))

    def felt(kind):
        built = potential(kind, cutoff=2.0)
        turned = [(numbers, pos @ molecules.rotation(seed).numpy().T) for seed in range(24)]
        spread = [built([molecules.batch(m)])[0].energy.std(0) for m in (turned, [(numbers, x) for x in distorted])]
        return (spread[0] / spread[1]).mean()

    assert felt("smooth") < 0.5 * felt("cells")


@pytest.mark.parametrize("kind", FAR)
def test_an_atom_beyond_the_cutoff_is_seen(kind):
    built = potential(kind)
    (numbers, pos), shift = chain(12), np.zeros((12, 3))
    shift[-1, 0] = 4.0
    energies = built([molecules.batch([(numbers, pos + k * shift) for k in (1.0, 1.5)])])[0].energy
    assert np.linalg.norm(pos[-1] + shift[-1] - pos[:-1], axis=1).min() > built.config.cutoff
    assert (energies[0] - energies[1]).abs().min() > 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cutoff": 5.0, "long_range": {"kind": "cells", "spacing": 3.0}}, "too large for the cutoff"),
        ({"long_range": {"kind": "cells", "levels": 3}}, "levels has no effect"),
        ({"long_range": {"features": 4, "axis_features": 5}}, "must not exceed"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(settings)
