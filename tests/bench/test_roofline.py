"""The operations counted by formula are those that run."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from hpcmlip.bench import roofline
from hpcmlip.bench.stepping import data_spec, molecules, potential_step
from hpcmlip.models.hipnn import Config
from hpcmlip.models.potential import Potential


@pytest.mark.parametrize("resnet", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("atoms", [3, 9])
@pytest.mark.parametrize("lmax", [0, 1, 2])
def test_operations_of_the_products(lmax, atoms, resnet):
    numbers, pos = molecules(None, atoms, 2)
    config = Config(lmax=lmax, features=10, sensitivities=6, interactions=3, atom_layers=2, resnet=resnet)
    potential = Potential(config, data_spec(), seed=0)
    step = potential_step(potential, numbers, pos, "cpu")

    def added_in_place(_total, a, b, **_):  # which the counter's own table lacks
        return bmm_flop(a, b)

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.baddbmm_: added_in_place}) as counter:
        step()
    needed = roofline.products(potential.net, 2 * atoms, atoms)
    assert counter.get_total_flops() == sum(p.operations for p in needed)


def test_other_operations():
    a, b = torch.ones(2, 100)
    number, moved = roofline.rest(lambda: (a.reshape(10, 10) @ b.reshape(10, 10), a + b))
    assert (number, moved) == (1, 1200)


def test_account():
    needed = [roofline.Product("square", 1, 1000, 1000, 1000, times=3)]
    seconds = {"hpcmlip": [0.1], "products": [0.05], "matrix": [2 * 1.024**3 * 1e-2], "triad": [12 * 8 * 2**20 * 1e-10]}
    found = roofline.account(needed, (10, 10**8), seconds)
    assert found["operations"] == 6 * 10**9 and found["products_bytes"] == 36 * 10**6
    assert found["matrix_gflops"] == pytest.approx(100, rel=1e-2)
    assert found["bandwidth_gb_per_s"] == pytest.approx(10, rel=1e-2)
    assert found["bound_fraction"] == pytest.approx(0.6, rel=1e-2) and found["products_fraction"] == 0.5
    assert found["other_milliseconds"] == pytest.approx(10, rel=1e-2)
