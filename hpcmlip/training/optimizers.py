"""The optimizers by `optim.kind`: those of torch, and Yogi in the same form."""

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What the optimizers keep for each parameter, besides the number of updates."""


class Yogi(torch.optim.Optimizer):
    """Yogi (Zaheer et al. 2018): Adam whose second moment changes by at most (1 - β2) g², however large it is,

        m <- β1 m + (1 - β1) g,    v <- v - (1 - β2) sign(v - g²) g²,    p <- p - lr m̂ / (√v̂ + eps),

    with m̂ = m / (1 - β1^t) and v̂ = v / (1 - β2^t) after t updates. m begins at 0, v at `INITIAL_SQUARE`. As in torch's
    Adam, whose names the state has, weight decay is added to the gradient.
    """

    INITIAL_SQUARE = 1e-6

    def __init__(self, params, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict, params: list[Tensor]) -> None:
        (beta1, beta2), decay = group["betas"], group["weight_decay"]
        for p in params:
            if not self.state[p]:
                self.state[p] = initial_state(self, p)
            self.state[p]["step"] += 1
        grads = [p.grad for p in params]
        if decay:
            grads = torch._foreach_add(grads, params, alpha=decay)
        mean, square = ([self.state[p][key] for p in params] for key in MOMENTS)
        torch._foreach_lerp_(mean, grads, 1 - beta1)
        grads_square = torch._foreach_mul(grads, grads)
        change = torch._foreach_sign(torch._foreach_sub(square, grads_square))
        torch._foreach_addcmul_(square, change, grads_square, value=beta2 - 1)
        steps = [float(self.state[p]["step"]) for p in params]
        root = torch._foreach_sqrt(torch._foreach_div(square, [1 - beta2**t for t in steps]))
        torch._foreach_add_(root, group["eps"])
        torch._foreach_addcdiv_(params, mean, root, [-group["lr"] / (1 - beta1**t) for t in steps])


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "yogi": Yogi}


def initial_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What the optimizer keeps for a parameter before its first update."""
    square = getattr(optimizer, "INITIAL_SQUARE", 0.0)
    start = (torch.zeros_like(parameter.data), torch.full_like(parameter.data, square))
    return {"step": torch.tensor(0.0), **dict(zip(MOMENTS, start, strict=True))}
