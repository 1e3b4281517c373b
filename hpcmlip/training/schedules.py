"""Learning rates: pure functions of the position in the run; only the plateau remembers what validation said.

A position is a step number (for the warm-up) and a number of epochs done, with a fraction. Warm-up is a linear rise to
the full rate; the schedule proper begins where it ends.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hpcmlip.config import OptimSection, ScheduleSection

_ONE_CYCLE_START = 25.0
"""One-cycle schedules begin at lr / 25 unless told (Smith & Topin 2018; so does torch's OneCycleLR)."""


@dataclass(frozen=True)
class Position:
    """Where in a run a step stands."""

    step: int
    """Steps done before it."""
    epoch: float
    """Epochs done before it, with a fraction."""
    epochs: int
    """Epochs of the whole run."""
    warmup_epochs: float
    """Epochs that the warm-up takes."""


@dataclass(frozen=True)
class Plateau:
    """Memory of the plateau schedule and of the early stop."""

    scale: float = 1.0
    """Factor on the rate so far."""
    best: float = math.inf
    since_fall: int = 0
    """Validations without improvement since the rate last fell (or the objective last improved)."""
    since_best: int = 0
    """Validations without improvement since the best."""

    def after(self, objective: float, section: ScheduleSection) -> "Plateau":
        """Memory after another validation; a value that is not a number is no improvement."""
        if objective < self.best:
            return Plateau(self.scale, objective, 0, 0)
        since_fall = self.since_fall + 1
        if section.kind != "plateau" or since_fall < section.patience:
            return Plateau(self.scale, self.best, since_fall, self.since_best + 1)
        return Plateau(self.scale * section.factor, self.best, 0, self.since_best + 1)


def rate(optim: OptimSection, position: Position, plateau: Plateau) -> float:
    """Learning rate of the step at `position`."""
    warmup = optim.schedule.warmup_steps
    if position.step < warmup:
        return optim.lr * plateau.scale * (position.step + 1) / warmup
    if optim.schedule.per == "epoch":
        return SCHEDULES[optim.schedule.kind](optim, position.epoch % 1, 1.0, plateau.scale)
    begun = min(position.warmup_epochs, position.epochs)
    done = position.epoch - begun
    total = max(position.epochs - begun, 1e-9)
    return SCHEDULES[optim.schedule.kind](optim, max(done, 0.0), total, plateau.scale)


def is_exhausted(optim: OptimSection, plateau: Plateau) -> bool:
    """Has the plateau schedule let the rate fall below its minimum?"""
    return optim.schedule.kind == "plateau" and optim.lr * plateau.scale < optim.schedule.min_lr


def _constant(optim: OptimSection, done: float, total: float, scale: float) -> float:
    return optim.lr


def _plateau(optim: OptimSection, done: float, total: float, scale: float) -> float:
    return optim.lr * scale


def _cosine(optim: OptimSection, done: float, total: float, scale: float) -> float:
    return _blend(optim.lr, optim.schedule.min_lr, done / total)


def _exponential(optim: OptimSection, done: float, total: float, scale: float) -> float:
    decays = done / optim.schedule.decay_epochs
    return optim.lr * optim.schedule.factor ** (math.floor(decays) if optim.schedule.staircase else decays)


def _one_cycle(optim: OptimSection, done: float, total: float, scale: float) -> float:
    part, rise = done / total, optim.schedule.rise
    if part < rise:
        return _blend(_start(optim), optim.lr, part / rise)
    return _blend(optim.lr, optim.schedule.min_lr, (part - rise) / (1 - rise))


def _one_cycle_linear(optim: OptimSection, done: float, total: float, scale: float) -> float:
    """Lines from the start to lr at `rise` of the cycle, back at twice that, and to the minimum at its end."""
    rise = optim.schedule.rise
    knots = (0.0, rise, 2 * rise, 1.0)
    return float(np.interp(done / total, knots, (_start(optim), optim.lr, _start(optim), optim.schedule.min_lr)))


def _start(optim: OptimSection) -> float:
    return optim.schedule.start_lr or optim.lr / _ONE_CYCLE_START


def _blend(start: float, end: float, part: float) -> float:
    """Half a cosine wave from `start` at part 0 to `end` at part 1."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(max(part, 0.0), 1.0)))


SCHEDULES: dict[str, Callable[[OptimSection, float, float, float], float]] = {
    "constant": _constant,
    "plateau": _plateau,
    "cosine": _cosine,
    "exponential": _exponential,
    "one_cycle": _one_cycle,
    "one_cycle_linear": _one_cycle_linear,
}
"""`schedule.kind` -> (optim, epochs done and in all since the warm-up, plateau scale) -> rate."""


def ema_decay(decay: float, updates: int) -> float:
    """Decay of the weight average at its n-th update: short at first, to forget the initial weights soon."""
    return min(decay, (1 + updates) / (10 + updates))
