"""A step of ours in a process of its own, asked through a pipe like the peers: a busy machine then slows all alike.

In one process with what waits for its turn elsewhere, ours would be the one that the scheduler makes wait.
"""

from collections.abc import Callable
from multiprocessing import get_context

import numpy as np
import torch

from hpcmlip.bench.peers import Memory
from hpcmlip.bench.stepping import Step, timer
from hpcmlip.errors import RunError

FEW = 2
"""Molecules of the step that compiles and loads libraries before memory is measured."""
Make = Callable[[str, str], Callable[[np.ndarray, np.ndarray], Step]]
"""A function of a module: (settings, device) -> from atomic numbers [B, N] and positions [B, N, 3] Å, a step."""


class OwnProcess:
    """The step that `make` gives for `settings`, on molecules [B, N], [B, N, 3] Å."""

    def __init__(self, name: str, make: Make, settings: str, numbers, pos, threads: int, device: str):
        self.name, self.bytes = name, 0
        context = get_context("spawn")
        self._pipe, other = context.Pipe()
        arguments = (other, make, settings, numbers, pos, threads, device)
        self._process = context.Process(target=_answer, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def step(self, count: int) -> float:
        """Seconds of a step on the first `count` molecules; `bytes` is then the growth of its memory so far."""
        try:
            self._pipe.send(count)
            seconds, self.bytes = self._pipe.recv()
        except (EOFError, OSError):
            raise RunError(f"{self.name} gave no answer: its error stands above") from None
        return seconds

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _answer(pipe, make: Make, settings: str, numbers, pos, threads: int, device: str) -> None:
    torch.set_num_threads(threads)
    step_on = make(settings, device)
    step_on(numbers[:FEW], pos[:FEW])()
    last, timed, memory = 0, None, None
    while True:
        try:
            count = pipe.recv()
        except EOFError:
            return
        if count != last:
            timed = timer(step_on(numbers[:count], pos[:count]))
            last, memory = count, Memory(device)
        pipe.send((timed(), memory.growth()))
