"""A training step of another program's model, in the Python that has it: `PYTHON peers.py NAME`, told by its stdin.

Imports torch and the peer only, since peers and hpcmlip may need different versions of other packages. The first line
of the input is {"species": [B][N], "pos": [B][N][3] Å, "threads", "device"}, answered by {"parameters", "version"};
each further line is a number of molecules, answered by {"seconds", "bytes"} of a step on the first so many: energies,
forces and the backward pass of a squared error of both to all parameters. The models are untrained.
"""

import ctypes
import gc
import json
import sys
import time
from importlib import metadata

import torch
from torch import nn

SPECIES = 4
"""H, C, N, O."""


class Memory:
    """How far the memory of this process, or of the GPU, has grown beyond what it was here."""

    def __init__(self, device: str):
        self._device = device
        if device == "cpu":
            # what was freed before would hide what is needed now
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak is counted anew from here
            self._before = _status("VmRSS")
        else:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()

    def growth(self) -> int:
        """Bytes at the peak."""
        peak = _status("VmHWM") if self._device == "cpu" else torch.cuda.max_memory_allocated()
        return peak - self._before


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith(key)]
    return 1024 * int(line.split()[1])


class Egnn(nn.Module):
    """EGNN of egnn-pytorch; coordinates stay, as in our preset."""

    def __init__(self):
        from egnn_pytorch import EGNN_Network

        super().__init__()
        self.network = EGNN_Network(num_tokens=SPECIES, dim=128, depth=3, update_coors=False)
        self.head = nn.Linear(128, 1)

    def forward(self, species, pos):
        features, _ = self.network(species, pos)
        return self.head(features).sum((1, 2))


class Se3Transformer(nn.Module):
    """SE(3)-Transformer of se3-transformer-pytorch, degrees 0 to 2, the channels divided among the heads."""

    def __init__(self):
        from se3_transformer_pytorch import SE3Transformer

        super().__init__()
        settings = {"dim": 16, "heads": 8, "dim_head": 2, "depth": 3, "num_degrees": 3, "valid_radius": 5.0}
        self.network = SE3Transformer(num_tokens=SPECIES, differentiable_coors=True, **settings)
        self.head = nn.Linear(16, 1)

    def forward(self, species, pos):
        mask = torch.ones_like(species, dtype=torch.bool)
        return self.head(self.network(species, pos, mask, return_type=0)).sum((1, 2))


class Ani(nn.Module):
    """ANI-1x of torchani, one network an element."""

    def __init__(self):
        from torchani.aev import AEVComputer
        from torchani.nn import ANINetworks

        super().__init__()
        self.aev, self.networks = AEVComputer.like_1x(), ANINetworks.like_1x()

    def forward(self, species, pos):
        return self.networks(species, self.aev(species, pos))


class Deepmd(nn.Module):
    """DeepPot-SE (se_e2_a) of deepmd-kit's PyTorch backend, sizes of our preset; slots for just the atoms there are."""

    def __init__(self, species: torch.Tensor):
        from deepmd.pt.model.model import get_model

        super().__init__()
        slots = [max(int((species == s).sum(1).max()), 1) for s in range(SPECIES)]
        descriptor = {"type": "se_e2_a", "sel": slots, "rcut": 6.0, "rcut_smth": 4.0, "type_one_side": False}
        descriptor |= {"neuron": [96, 64, 32], "axis_neuron": 8, "precision": "float32"}
        fitting = {"neuron": [128] * 7, "precision": "float32"}
        settings = {"type_map": ["H", "C", "N", "O"], "descriptor": descriptor, "fitting_net": fitting}
        self.model = get_model(settings).to(species.device).train()

    def forward(self, species, pos):
        said = self.model(pos, species)
        return said["energy"][:, 0], said["force"]


PEERS = {"egnn-pytorch": Egnn, "se3-transformer-pytorch": Se3Transformer, "torchani": Ani, "deepmd-kit": Deepmd}


def step(model: nn.Module, species: torch.Tensor, pos: torch.Tensor) -> None:
    """Forward, forces and backward once."""
    model.zero_grad()
    leaf = pos.detach().requires_grad_()
    energy = model(species, leaf)
    if isinstance(energy, tuple):
        energy, forces = energy  # it takes the derivatives by itself
    else:
        forces = -torch.autograd.grad(energy.sum(), leaf, create_graph=True)[0]
    ((energy - 1).square().mean() + (forces - 1).square().mean()).backward()


def main() -> None:
    """Answer until the input ends."""
    # what a peer prints must not come between the answers
    answers, sys.stdout = sys.stdout, sys.stderr
    name, given = sys.argv[1], json.loads(sys.stdin.readline())
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    device = given["device"]
    species, pos = torch.tensor(given["species"], device=device), torch.tensor(given["pos"], device=device)
    try:
        peer = PEERS[name]
        model = (peer(species) if peer is Deepmd else peer()).to(device)
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    parameters = sum(p.numel() for p in model.parameters())
    print(json.dumps({"parameters": parameters, "version": metadata.version(name)}), file=answers, flush=True)
    step(model, species[:2], pos[:2])
    memory = Memory(device)
    for line in sys.stdin:
        count = int(line)
        begin = time.perf_counter()
        step(model, species[:count], pos[:count])
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "bytes": memory.growth()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
