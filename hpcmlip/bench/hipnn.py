"""Our HIP-NN-TS against hippynn's, with the same weights on the same molecules, in one run and interleaved.

What is timed: energies, forces and the backward pass of a squared error of both to all parameters, from positions on.
hippynn gets its list of pairs for nothing (built once, not timed); our neighbourhoods are part of the time.
"""

import argparse
import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from hpcmlip.batch import AtomsBatch, DataSpec
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.graph import DenseTopology
from hpcmlip.models.hipnn import HEAD_UNIT, Config
from hpcmlip.models.hippynn_state import load_hippynn_state
from hpcmlip.models.potential import Potential

COMPONENT = "energy + forces + backward of HIP-NN-TS, ours against hippynn"

ELEMENTS = (1, 6, 7, 8)
Step = Callable[[], tuple[Tensor, Tensor]]
"""Forward and backward once -> (energies [B], forces [A, 3]), kcal/mol; gradients are left in the parameters."""


def main(args: Sequence[str]) -> int:
    """Check that both agree, time both, print a table and a line of JSON; 1 if they do not agree."""
    options = _parse(args)
    torch.set_num_threads(options.threads)
    peer = _Peer(options)
    numbers, pos = _molecules(options)
    differences = _compare(peer, options, numbers, pos)
    worst = max(differences.values())
    # hippynn's numba kernels leave out sensitivities below 1e-10
    if not worst < 1e-6:
        print(f"the two do not agree in float64: relative differences {differences}")
        return 1
    trial = _times({name: peer.with_kernels(name, numbers, pos) for name in peer.kernels}, options.trials)
    fastest = min(trial, key=lambda name: statistics.median(trial[name]))
    steps = {"hippynn": peer.with_kernels(fastest, numbers, pos), "hpcmlip": _ours(peer, options, numbers, pos)}
    result = _summary(_times(steps, options.repeats), differences) | {
        "hippynn_kernels": fastest,
        "hippynn_kernels_milliseconds": {name: _milliseconds(values) for name, values in trial.items()},
        "torch": torch.__version__,
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
    }
    _show(result)
    return 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hpcmlip bench hipnn", description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--lmax", type=int, choices=(0, 1, 2), default=2)
    parser.add_argument("--interactions", type=int, default=2)
    parser.add_argument("--atom-layers", type=int, default=3)
    parser.add_argument("--atoms", type=int, default=9, help="size of the molecules")
    parser.add_argument("--molecules", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--kernels", nargs="+", help="hippynn's, by its names; default: all there are, compiled ones too"
    )
    parser.add_argument("--trials", type=int, default=2, help="steps with each of the kernels, to find the fastest")
    parser.add_argument("--data", type=Path, help="raw HDF5 file in the ANI-1x layout; default: the packaged sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(args)


def _molecules(options) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers [B, N] and positions [B, N, 3] Å of real conformations of `options.atoms` atoms."""
    from hpcmlip import configs

    path = options.data or configs.path("samples/ab_initio_small.h5")
    found = []
    with h5py.File(path) as file:
        for group in file.values():
            numbers = group["atomic_numbers"][:]
            if len(numbers) == options.atoms and set(numbers.tolist()) <= set(ELEMENTS):
                found += [(numbers.astype(np.int64), pos) for pos in group["coordinates"][: options.molecules]]
    if not found:
        raise DataError(f"{path} holds no molecule of {options.atoms} atoms: choose another size with --atoms")
    # evenly over what there is, and again from the start if that is too little
    chosen = [found[int(i * max(len(found) / options.molecules, 1)) % len(found)] for i in range(options.molecules)]
    return np.stack([numbers for numbers, _ in chosen]), np.stack([pos for _, pos in chosen])


class _Peer:
    """hippynn's network and energy head, and its step."""

    def __init__(self, options):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import hippynn
                from hippynn.layers.targets import HEnergy
                from hippynn.networks.hipnn import Hipnn, HipnnQuad, HipnnVec
        except ImportError:
            raise ConfigError("this benchmark needs hippynn: pip install 'hpcmlip[bench]'") from None
        self.module, self.options = hippynn, options
        hippynn.settings.WARN_LOW_DISTANCES = False
        torch.manual_seed(0)
        cls = (Hipnn, HipnnVec, HipnnQuad)[options.lmax]
        width, depth = options.features, options.atom_layers
        self.network = cls(width, 20, 0.75, 5.5, 6.5, depth, options.interactions, [0, *ELEMENTS])
        self.head = HEnergy(self.network.feature_sizes)
        # head 0 is fitted and frozen in both programs
        self.head.layers[0].weight.requires_grad_(False)

    @property
    def kernels(self) -> list[str]:
        """Names of the kernels to try; "pytorch" is torch.compile of "_pytorch_raw"."""
        if self.options.kernels:
            return self.options.kernels
        available = self.module.custom_kernels.populate_custom_kernel_availability()
        on_cpu = ("numba", "pytorch", "sparse")
        return ["_pytorch_raw"] + [name for name in available if name in on_cpu or self.options.device != "cpu"]

    def with_kernels(self, name: str, numbers, pos, dtype=torch.float32) -> Step:
        device = self.options.device
        network, head = (copy.deepcopy(part).to(device, dtype) for part in (self.network, self.head))
        B, N = numbers.shape
        x = torch.tensor(pos, dtype=dtype, device=device).reshape(-1, 3)
        onehot = torch.nn.functional.one_hot(_species(numbers, device), len(ELEMENTS))
        structure = torch.arange(B, device=device).repeat_interleave(N)
        near = (torch.cdist(x, x) < 6.5) & (structure[:, None] == structure[None, :])
        first, second = near.fill_diagonal_(False).nonzero(as_tuple=True)
        targets = _targets(B, N, x)

        def step():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "_pytorch_raw" is not among the advertised names
                self.module.custom_kernels.set_custom_kernels(name)
            network.zero_grad(), head.zero_grad()
            leaf = x.detach().requires_grad_()
            vec = leaf[second] - leaf[first]
            extra = (vec,) if self.options.lmax else ()
            features = network(onehot, first, second, vec.norm(dim=1), *extra)
            energy = head(features, structure, B)[0][:, 0]
            forces = -torch.autograd.grad(energy.sum(), leaf, create_graph=True)[0]
            _loss(energy, forces, targets).backward()
            return energy.detach(), forces.detach()

        step.parts = (network, head)
        return step


def _ours(peer: _Peer, options, numbers, pos, dtype=torch.float32) -> Step:
    device = options.device
    keys = ("features", "lmax", "interactions", "atom_layers")
    config = Config(**{key: getattr(options, key) for key in keys})
    zero = np.zeros((1, len(ELEMENTS)))
    spec = DataSpec(ELEMENTS, ("level",), (0,), reference=zero, residual=zero, isolated=(True,))
    potential = Potential(config, spec, seed=0).to(device, dtype).train()
    load_hippynn_state(potential.net, peer.network.state_dict(), [peer.head.state_dict()])
    B, N = numbers.shape
    x = torch.tensor(pos, dtype=dtype, device=device).reshape(-1, 3)
    topology = DenseTopology(B, N)
    weight, source = torch.ones(B, dtype=dtype, device=device), np.zeros((B, 4), dtype=np.int64)
    batch = AtomsBatch(_species(numbers, device), x, topology, energy=None, forces=None, weight=weight, source=source)
    targets = _targets(B, N, x)

    def step():
        potential.zero_grad()
        (prediction,) = potential([batch])
        energy, forces = prediction.energy[:, 0] / HEAD_UNIT, prediction.forces[:, 0] / HEAD_UNIT
        _loss(energy, forces, targets).backward()
        return energy.detach(), forces.detach()

    step.parts = (potential,)
    return step


def _species(numbers, device) -> Tensor:
    return torch.tensor(np.searchsorted(ELEMENTS, numbers.reshape(-1)), device=device)


def _targets(B: int, N: int, like: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(10 * torch.randn(shape, generator=generator).to(like) for shape in ((B,), (B * N, 3)))


def _loss(energy: Tensor, forces: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    return (energy - targets[0]).square().mean() + (forces - targets[1]).square().mean()


def _compare(peer: _Peer, options, numbers, pos) -> dict[str, float]:
    """Largest difference of energies, forces and gradients in float64, relative to the largest value of each."""
    theirs = peer.with_kernels("_pytorch_raw", numbers, pos, torch.float64)
    ours = _ours(peer, options, numbers, pos, torch.float64)
    results = dict(zip(("energy", "forces"), zip(theirs(), ours(), strict=True), strict=True))
    network, head = theirs.parts
    potential = ours.parts[0]
    expected = copy.deepcopy(potential.net)
    extra = {name: value for name, value in network.state_dict().items() if name.endswith("_extra_state")}
    gradients = [
        {name: p.grad if p.requires_grad else p for name, p in part.named_parameters()} for part in (network, head)
    ]
    load_hippynn_state(expected, gradients[0] | extra, [gradients[1]])
    difference = {name: float((a - b).abs().max() / a.abs().max()) for name, (a, b) in results.items()}
    pairs = zip(potential.net.parameters(), expected.parameters(), strict=True)
    relative = [float((p.grad - e.detach()).norm() / e.detach().norm()) for p, e in pairs]
    return difference | {"gradients": max(relative)}


def _times(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repeat; the steps take turns, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            _synchronize()
            start = time.perf_counter()
            step()
            _synchronize()
            if repeat:  # the first one compiles and allocates
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _milliseconds(seconds: list[float]) -> float:
    return round(1e3 * statistics.median(seconds), 2)


def _summary(seconds: dict[str, list[float]], differences: dict[str, float]) -> dict:
    ratios = sorted(a / b for a, b in zip(seconds["hippynn"], seconds["hpcmlip"], strict=True))
    quarter = len(ratios) // 4
    return {
        "milliseconds": {name: _milliseconds(values) for name, values in seconds.items()},
        "ratio": round(statistics.median(ratios), 2),
        "ratio_quartiles": [round(ratios[quarter], 2), round(ratios[-1 - quarter], 2)],
        "relative_difference_float64": differences,
    }


def _show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="HIP-NN-TS: energy + forces + backward", title_justify="left")
    for column in ("program", "median ms a step", "structures/s"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for name, milliseconds in result["milliseconds"].items():
        label = f"{name} ({result['hippynn_kernels']} kernels)" if name == "hippynn" else name
        table.add_row(label, f"{milliseconds:.1f}", f"{1e3 * result['molecules'] / milliseconds:.0f}")
    console = Console()
    console.print(table)
    low, high = result["ratio_quartiles"]
    settings = " ".join(f"{k}={result[k]}" for k in ("lmax", "features", "atoms", "molecules", "threads", "device"))
    console.print(f"hpcmlip is {result['ratio']} times as fast (quartiles {low} to {high}); {settings}")
    print(json.dumps(result))
