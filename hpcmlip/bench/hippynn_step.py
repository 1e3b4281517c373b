"""hippynn's HIP-NN-TS, the reference of the speed benchmarks, and its step."""

import copy
import statistics
import warnings
from collections.abc import Sequence

import numpy as np
import torch

from hpcmlip.bench.stepping import ELEMENTS, Step, loss, species, take_turns, targets, timer
from hpcmlip.errors import ConfigError

CUTOFF = 6.5
"""Å."""


class Hippynn:
    """A network and energy head of hippynn. Raises ConfigError if it is not installed."""

    def __init__(self, *, features: int, lmax: int, interactions: int, atom_layers: int, device: str):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import hippynn
                from hippynn.layers.targets import HEnergy
                from hippynn.networks.hipnn import Hipnn, HipnnQuad, HipnnVec
        except ImportError:
            raise ConfigError("this benchmark needs hippynn: pip install 'hpcmlip[bench]'") from None
        self.module, self.lmax, self.device = hippynn, lmax, device
        hippynn.settings.WARN_LOW_DISTANCES = False
        torch.manual_seed(0)
        cls = (Hipnn, HipnnVec, HipnnQuad)[lmax]
        self.network = cls(features, 20, 0.75, CUTOFF - 1, CUTOFF, atom_layers, interactions, [0, *ELEMENTS])
        self.head = HEnergy(self.network.feature_sizes)
        # head 0 is fitted and frozen in both programs
        self.head.layers[0].weight.requires_grad_(False)

    def kernels(self) -> list[str]:
        """Names of all kernels for the device; "pytorch" is torch.compile of "_pytorch_raw"."""
        available = self.module.custom_kernels.populate_custom_kernel_availability()
        on_cpu = ("numba", "pytorch", "sparse")
        return ["_pytorch_raw"] + [name for name in available if name in on_cpu or self.device != "cpu"]

    def trial(self, kernels: Sequence[str], numbers: np.ndarray, pos: np.ndarray, repeats: int) -> dict[str, list]:
        """Seconds of some steps with each of the kernels."""
        return take_turns({name: timer(self.step(name, numbers, pos)) for name in kernels}, repeats)

    def step(self, kernels: str, numbers: np.ndarray, pos: np.ndarray, dtype=torch.float32) -> Step:
        """The step on molecules [B, N], [B, N, 3]; it gets its list of pairs for nothing."""
        network, head = (copy.deepcopy(part).to(self.device, dtype) for part in (self.network, self.head))
        B, N = numbers.shape
        x = torch.tensor(pos, dtype=dtype, device=self.device).reshape(-1, 3)
        onehot = torch.nn.functional.one_hot(species(numbers, self.device), len(ELEMENTS))
        structure = torch.arange(B, device=self.device).repeat_interleave(N)
        near = (torch.cdist(x, x) < CUTOFF) & (structure[:, None] == structure[None, :])
        first, second = near.fill_diagonal_(False).nonzero(as_tuple=True)
        wanted = targets(B, N, x)

        def step():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "_pytorch_raw" is not among the advertised names
                self.module.custom_kernels.set_custom_kernels(kernels)
            network.zero_grad(), head.zero_grad()
            leaf = x.detach().requires_grad_()
            vec = leaf[second] - leaf[first]
            extra = (vec,) if self.lmax else ()
            features = network(onehot, first, second, vec.norm(dim=1), *extra)
            energy = head(features, structure, B)[0][:, 0]
            forces = -torch.autograd.grad(energy.sum(), leaf, create_graph=True)[0]
            loss(energy, forces, wanted).backward()
            return energy.detach(), forces.detach()

        step.parts = (network, head)
        return step


def fastest(trial: dict[str, list]) -> str:
    """Kernels of the shortest median."""
    return min(trial, key=lambda name: statistics.median(trial[name]))
