"""Written-out derivatives against autograd's and against differences, both orders, in float64."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import softplus
from torch.testing import assert_close

from hpcmlip.models import fused


def random(*shape: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()


def plain_norms(moments: Tensor, cusp: float) -> tuple[Tensor, ...]:
    lmax = round(moments.shape[1] ** 0.5) - 1
    parts = [moments[:, n * n : (n + 1) ** 2] for n in range(1, lmax + 1)]
    return (moments[:, 0], *(torch.sqrt((part * part).sum(1) + cusp) for part in parts))


CASES = {
    "product": (fused.product, torch.bmm, (random(3, 4, 2), random(3, 2, 5))),
    "product transposed": (
        lambda a, b: fused.product(a.mT, b),
        lambda a, b: torch.bmm(a.mT, b),
        (random(3, 2, 4), random(3, 2, 5)),
    ),
    "smooth_relu": (fused.smooth_relu, softplus, (random(4, 3, scale=3),)),
    "gaussian": (lambda u: fused.gaussian(u, 1e-20), lambda u: torch.exp(-0.5 * u * u), (random(4, 3),)),
    **{
        f"norms up to lmax {lmax}": (
            lambda m: fused.norms(m, 1e-2),
            lambda m: plain_norms(m, 1e-2),
            (random(3, (lmax + 1) ** 2, 2),),
        )
        for lmax in (0, 1, 2)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_both_derivatives(case):
    fn, _, inputs = CASES[case]
    assert gradcheck(fn, inputs)
    assert gradgradcheck(fn, inputs)


@pytest.mark.parametrize("case", CASES)
def test_same_as_autograd(case):
    """Value, gradient, and the gradient of a function of the gradient."""

    def results(fn, inputs):
        out = fn(*inputs)
        total = sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))
        slopes = torch.autograd.grad(total, inputs, create_graph=True)
        curved = torch.autograd.grad(total + sum(x.square().sum() for x in slopes), inputs)
        return (total, *slopes, *curved)

    fn, plain, inputs = CASES[case]
    assert_close(results(fn, inputs), results(plain, inputs), rtol=1e-12, atol=1e-12)


def test_a_negligible_gaussian_vanishes_with_its_derivatives():
    u = torch.tensor([0.0, 9.0, 9.7, 30.0, -30.0], dtype=torch.float64, requires_grad=True)
    value = fused.gaussian(u, 1e-20)
    (slope,) = torch.autograd.grad(value.sum(), u, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), u)
    for x in (value, slope, second):
        assert not x[2:].any()
    assert value[1] > 0 and slope[1] < 0 and second[1] > 0


def test_only_what_is_differentiated():
    """A product one of whose factors has no second derivative."""
    a, b = random(2, 3, 4), random(2, 4, 3)
    (slope,) = torch.autograd.grad(fused.product(a, b).sum(), a, create_graph=True)
    (found,) = torch.autograd.grad(slope.square().sum(), b)
    (slope,) = torch.autograd.grad(torch.bmm(a, b).sum(), a, create_graph=True)
    (expected,) = torch.autograd.grad(slope.square().sum(), b)
    assert_close(found, expected)
