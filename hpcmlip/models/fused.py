"""Operations with first and second derivatives written out, for models whose forces are trained on.

Training on forces differentiates twice. Autograd composes the second derivative of what it has for the first, in many
passes over memory and with results laid out the wrong way round for the next operation. These do the same in fewer.
What comes out can be differentiated twice, not three times.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

_recorded = contextvars.ContextVar("recorded", default=False)


@contextlib.contextmanager
def recorded() -> Iterator[None]:
    """Within, these are torch's own operations: for a graph from which derivatives are taken later."""
    token = _recorded.set(True)
    try:
        yield
    finally:
        _recorded.reset(token)


def product(a: Tensor, b: Tensor) -> Tensor:
    """[n, I, J], [n, J, K] -> [n, I, K]: torch.bmm, every derivative laid out as what it belongs to."""
    return torch.bmm(a, b) if _recorded.get() else _Product.apply(a, b)


def smooth_relu(x: Tensor) -> Tensor:
    """log(1 + exp(x)) of every element: torch's softplus."""
    if _recorded.get() or not x.requires_grad:
        return softplus(x)
    slope = torch.sigmoid(x.detach())
    return _Pointwise.apply(x, softplus(x.detach()), slope, slope - slope * slope)


def gaussian(u: Tensor, smallest: float) -> Tensor:
    """exp(-u²/2) of every element; where that is below `smallest` it is 0, with all derivatives."""
    if _recorded.get():
        exponent, lowest = -0.5 * u * u, math.log(smallest)
        return torch.where(exponent > lowest, exponent.clamp(min=lowest).exp(), 0.0)
    v = u.detach()
    value = torch.threshold(torch.exp((-0.5 * v * v).clamp_min_(math.log(smallest))), 1.001 * smallest, 0.0)
    slope = -v * value
    return _Pointwise.apply(u, value, slope, -v * slope - value)


def norms(moments: Tensor, cusp: float) -> tuple[Tensor, ...]:
    """[A, (lmax + 1)^2, F] -> lmax + 1 tensors [A, F]: the scalars, then sqrt(sum_m M_lm² + cusp) of order 1, 2, ..."""
    if _recorded.get():
        scalars, *others = _orders(moments)
        return scalars[:, 0], *((part.square().sum(dim=1) + cusp).sqrt() for part in others)
    return _Norms.apply(moments, cusp)


class _Product(Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch.bmm(a, b)

    @staticmethod
    def backward(ctx, g: Tensor):
        return _ProductSlope.apply(g, *ctx.saved_tensors)


class _ProductSlope(Function):
    """Derivatives by a and b of sum(g a b)."""

    @staticmethod
    def forward(ctx, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(g, a, b)
        ctx.set_materialize_grads(False)
        return torch.bmm(g, b.mT), torch.bmm(a.mT, g)

    @staticmethod
    @once_differentiable
    def backward(ctx, ha: Tensor | None, hb: Tensor | None):
        g, a, b = ctx.saved_tensors
        to_g = to_a = to_b = None
        if ha is not None:
            to_g, to_b = torch.bmm(ha, b), torch.bmm(ha.mT, g)
        if hb is not None:
            to_g = torch.bmm(a, hb) if to_g is None else to_g.baddbmm_(a, hb)
            to_a = torch.bmm(g, hb.mT)
        return to_g, to_a, to_b


class _Pointwise(Function):
    """A function of every element, from its value and its first and second derivative there."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(x, first, second)
        return value

    @staticmethod
    def backward(ctx, g: Tensor):
        return _PointwiseSlope.apply(g, *ctx.saved_tensors), None, None, None


class _PointwiseSlope(Function):
    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(g, first, second)
        return g * first

    @staticmethod
    @once_differentiable
    def backward(ctx, h: Tensor):
        g, first, second = ctx.saved_tensors
        return h * first, (h * g).mul_(second), None, None


class _Norms(Function):
    @staticmethod
    def forward(ctx, moments: Tensor, cusp: float) -> tuple[Tensor, ...]:
        out = [moments[:, 0].clone()]
        out += [(_inner(part, part) + cusp).sqrt_() for part in _orders(moments)[1:]]
        ctx.save_for_backward(moments, *out[1:])
        return tuple(out)

    @staticmethod
    def backward(ctx, *g: Tensor):
        moments, *roots = ctx.saved_tensors
        # roots are functions of the moments: the second derivative below counts them in
        return _NormsSlope.apply(moments, *(root.detach() for root in roots), *g), None


class _NormsSlope(Function):
    @staticmethod
    def forward(ctx, moments: Tensor, *rest: Tensor) -> Tensor:
        lmax = len(rest) // 2
        roots, g = rest[:lmax], rest[lmax:]
        factors = [a / n for a, n in zip(g[1:], roots, strict=True)]
        ctx.save_for_backward(moments, *roots, *factors)
        out = torch.empty_like(moments)
        for part, source, factor in zip(_orders(out), _orders(moments), [None, *factors], strict=True):
            if factor is None:
                part.copy_(g[0][:, None])
            else:
                torch.mul(source, factor[:, None], out=part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, h: Tensor):
        lmax = len(ctx.saved_tensors) // 2
        moments, roots, factors = ctx.saved_tensors[0], ctx.saved_tensors[1 : lmax + 1], ctx.saved_tensors[lmax + 1 :]
        to_g = [h[:, 0]]
        to_moments = torch.empty_like(moments)
        to_moments[:, 0] = 0
        parts = zip(_orders(to_moments)[1:], _orders(moments)[1:], _orders(h)[1:], roots, factors, strict=True)
        for part, source, by, root, factor in parts:
            along = _inner(by, source).div_(root)
            to_g.append(along)
            torch.mul(by, factor[:, None], out=part)
            part.addcmul_(source, (along * factor).div_(root)[:, None], value=-1)
        return to_moments, *[None] * lmax, *to_g


def _orders(moments: Tensor) -> Sequence[Tensor]:
    """Views of the 1, 3, 5, ... components of each tensor order."""
    return [moments[:, n * n : (n + 1) ** 2] for n in range(round(moments.shape[1] ** 0.5))]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """[A, m, F] twice -> [A, F]: sum over components, one pass each (torch's own sum took four times as long)."""
    total = a[:, 0] * b[:, 0]
    for m in range(1, a.shape[1]):
        total.addcmul_(a[:, m], b[:, m])
    return total
