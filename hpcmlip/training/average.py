"""Exponential moving average of the weights; the raw weights stay what is trained."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from hpcmlip.training.schedules import ema_decay


class Average:
    """Moving average of parameters, the same on every rank; with decay 0 it is the parameters themselves."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], decay: float):
        self._parameters, self._decay = parameters, decay
        self.updates = 0
        self.tensors: dict[str, Tensor] = (
            {name: p.detach().clone() for name, p in parameters.items()} if decay > 0 else {}
        )

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters after an update: average = d average + (1 - d) parameter."""
        decay = ema_decay(self._decay, self.updates)
        self.updates += 1
        if self.tensors:
            new = [self._parameters[name].detach() for name in self.tensors]
            torch._foreach_lerp_(list(self.tensors.values()), new, 1 - decay)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Set the average to what a checkpoint held."""
        self.updates = updates
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While open, the parameters hold the average."""
        raw = {name: self._parameters[name].detach().clone() for name in self.tensors}
        self._set(self.tensors)
        try:
            yield
        finally:
            self._set(raw)

    @torch.no_grad()
    def _set(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].copy_(value)
