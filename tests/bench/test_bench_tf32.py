"""The rounding that stands for TF32, bit by bit."""

import torch

from hpcmlip.bench.tf32 import Rounded, rounded


def test_ten_bits_after_the_leading_one_stay():
    one, step = 1.0, 2.0**-10
    x = torch.tensor([one, one + step, one + 0.4 * step, one + 0.5 * step, one + 0.6 * step, -one - 0.6 * step, 0.0])
    expected = torch.tensor([one, one + step, one, one + step, one + step, -one - step, 0.0])
    assert torch.equal(rounded(x), expected)
    assert rounded(x.double()).dtype == torch.float64


def test_products_of_both_passes_are_rounded_and_nothing_else():
    weight = torch.nn.Parameter(torch.tensor([[1.0 + 2.0**-12]]))
    x = torch.tensor([[3.0]], requires_grad=True)
    with Rounded():
        y = torch.nn.functional.linear(x, weight)
        (slope,) = torch.autograd.grad(y, x)
    assert (float(y.detach()), float(slope)) == (3.0, 1.0)
    assert float(torch.nn.functional.linear(x, weight).detach()) != 3.0
    with Rounded():
        assert float((x * weight).detach()) != 3.0
