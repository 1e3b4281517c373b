"""Energies and forces of molecules as one compiled function, for training.

torch.compile takes one derivative of what it compiles, training on forces takes two. So the energies and their slopes
are first recorded as one graph of plain operations (`make_fx`), which is then compiled with its only derivative left.
Graph and code are made from invented molecules of a fixed size, with the numbers of molecules and atoms left open: they
serve all sizes, and are the same at every start. Before it is used, the compiled function has to agree with the eager
one, at that size and at another.

Nothing is kept for the next start: the compiler's caches are pickles in a folder that others may write to.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hpcmlip.errors import ConfigError
from hpcmlip.graph import DenseTopology, Topology
from hpcmlip.models import fused

log = logging.getLogger(__name__)

MOLECULES, ATOMS = 128, 13
"""Of the example. Two numbers that differ: for equal ones the graph would have one symbol."""
FEW = (3, 7)
"""Molecules and atoms of the second check; for small sizes the compiler makes code of its own."""
SPACING = 1.3
"""Å between atoms of the example, which sit on a disturbed cubic lattice."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Of energies, slopes and gradients: largest difference between eager and compiled, relative to their norm."""


_Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Positions [B, N, 3] Å and elements [B, N] -> what `Compiled` returns."""


class Compiled:
    """A network of atomic energies whose energies and slopes are compiled, for each set of levels when it is needed."""

    def __init__(self, net: nn.Module, cutoff: float, num_elements: int):
        self._net, self._cutoff, self._num_elements = net, cutoff, num_elements
        self._functions: dict[tuple, _Function] = {}
        self._folder = _private_folder()

    @staticmethod
    def takes(topology: Topology) -> bool:
        """Several molecules of several atoms: for the number 1 the compiler would make code of its own."""
        return isinstance(topology, DenseTopology) and topology.num_structures > 1 and topology.num_atoms > 1

    def __call__(
        self, species: Tensor, pos: Tensor, topology: DenseTopology, levels: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Of elements [A] and positions [A, 3] Å: energies [B, L] eV, terms [A, T, L] eV, and dE/dpos [A, 3] eV/Å of
        each of the levels. They can be differentiated by the weights, once.

        Raises ConfigError as `prepare`, which the first call with these levels does.
        """
        found = self.prepare(levels, pos.dtype, pos.device)
        return found(*_open(topology.by_structure(pos), topology.by_structure(species)))

    def prepare(self, levels: Sequence[int], dtype: torch.dtype, device: torch.device) -> _Function:
        """Compile, unless that was done. Raises ConfigError if the network cannot be compiled."""
        key = (tuple(levels), dtype, device)
        if key not in self._functions:
            self._functions[key] = self._compile(*key)
        return self._functions[key]

    def eager(self, levels: Sequence[int], pos: Tensor, species: Tensor) -> tuple[Tensor, ...]:
        """What `record` records."""
        topology = DenseTopology(*species.shape)
        with torch.enable_grad():
            x = pos.flatten(0, 1).detach().requires_grad_()
            terms = self._net(species.flatten(), topology.graph(x, self._cutoff))
            energy = topology.sum_atoms(terms.sum(dim=1))
            slopes = [torch.autograd.grad(energy[:, level].sum(), x, create_graph=True)[0] for level in levels]
        return energy, terms, *slopes

    def _compile(self, levels: Sequence[int], dtype: torch.dtype, device: torch.device) -> _Function:
        began = time.monotonic()
        example = _example(self._num_elements, dtype, device)
        few = tuple(x[: FEW[0], : FEW[1]].contiguous() for x in example)
        try:
            found = torch.compile(self.record(levels, *example), fullgraph=True)
            worst = max(
                _difference(self._with_gradients(found(*_open(*x))), self._with_gradients(self.eager(levels, *x)))
                for x in (example, few)
            )
        except Exception as error:  # whatever the compiler raises
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"engine.compile: the model cannot be compiled here ({type(error).__name__}: {reason}); set it to false"
            ) from error
        if not worst < TOLERANCE[dtype]:
            raise ConfigError(
                f"engine.compile: the compiled model differs from the eager one by {worst:.1g}; set it to false"
            )
        log.info("compiled energies and forces in %.0f s; they differ by %.1g at most", time.monotonic() - began, worst)
        return found

    def record(self, levels: Sequence[int], pos: Tensor, species: Tensor) -> torch.fx.GraphModule:
        """A graph of plain operations from positions [B, N, 3] Å and elements [B, N], of these or any other numbers
        above 1, to what a call returns."""
        from torch.fx.experimental.proxy_tensor import make_fx

        def call(pos: Tensor, species: Tensor) -> tuple[Tensor, ...]:
            return self.eager(levels, pos, species)

        with fused.recorded():
            found = make_fx(call, tracing_mode="symbolic", _allow_non_fake_inputs=True)(pos, species)
        # what the first derivative keeps of the forward pass is recorded as detached: here it has a derivative
        for node in found.graph.find_nodes(op="call_function", target=torch.ops.aten.detach.default):
            node.replace_all_uses_with(node.args[0])
            found.graph.erase_node(node)
        found.recompile()
        return found

    def _with_gradients(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs, and what a fixed sum of them gives as gradients of the weights."""
        weights = [p for p in self._net.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        total = sum((x * torch.randn(x.shape, generator=generator).to(x)).sum() for x in outputs)
        return [*outputs, *torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)]


def _private_folder() -> tempfile.TemporaryDirectory:
    """Where the compiler of this process writes, until it ends."""
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.enable_autograd_cache = torch._inductor.config.fx_graph_cache = False
    folder = tempfile.TemporaryDirectory(prefix="hpcmlip-compiled-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    return folder


def _difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest, each relative to the norm of what is expected."""
    with torch.no_grad():
        pairs = zip(found, expected, strict=True)
        return max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)


def _open(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same [B, N, ...] with a note to the compiler that B and N are going to change."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, (0, 1))
    return tensors


def _example(num_elements: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(positions [B, N, 3] Å, elements [B, N]) of invented molecules, always the same."""
    generator = torch.Generator().manual_seed(0)
    side = torch.arange(3, dtype=torch.float64)
    lattice = torch.cartesian_prod(side, side, side)[:ATOMS] * SPACING
    pos = lattice + 0.2 * torch.rand(MOLECULES, ATOMS, 3, generator=generator, dtype=torch.float64)
    species = torch.randint(num_elements, (MOLECULES, ATOMS), generator=generator)
    return pos.to(device, dtype), species.to(device)
