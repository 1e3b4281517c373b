"""`Potential`: a network of atomic energies turned into energies and conservative forces.

Forces are taken inside `forward`, so that a wrapper such as the DeepSpeed engine sees one call with one backward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpcmlip import plugins
from hpcmlip.batch import AtomsBatch, DataSpec, Prediction
from hpcmlip.config import ModelSection


class Potential(nn.Module):
    """Energies and forces of a model chosen by `config.kind`, for the elements and levels of `spec`.

    The initial weights (float32) follow from `seed` alone; the global random state is neither read nor changed.
    """

    def __init__(self, config: ModelSection, spec: DataSpec, *, seed: int):
        super().__init__()
        self.config, self.spec = config, spec
        net_cls = plugins.find("models", config.kind).Net
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.net = net_cls(config, spec)

    def forward(self, blocks: Sequence[AtomsBatch], *, force_levels: Sequence[int] | None = None) -> list[Prediction]:
        """One prediction per block: energies [B, L] eV and forces [A, len(force_levels), 3] eV/Å, F = -dE/dpos.

        `force_levels` are indices into `spec.levels` (None: `spec.force_levels`; empty: no forces). One reverse pass a
        level serves all blocks together, since structures do not interact. In training mode (and where gradients are
        on) the result can be differentiated, and a level without a force label in any of the blocks is left out: its
        plane is 0. In evaluation mode the result carries no graph if forces were asked for.
        """
        levels = self.spec.force_levels if force_levels is None else tuple(force_levels)
        differentiable = self.training and torch.is_grad_enabled()
        if not levels:
            return [self._energies(block, block.pos) for block in blocks]
        with torch.enable_grad():
            positions = [
                block.pos if block.pos.requires_grad else block.pos.detach().requires_grad_() for block in blocks
            ]
            energies = [self._energies(block, pos) for block, pos in zip(blocks, positions, strict=True)]
            wanted = [level for level in levels if not (self.training and _unlabelled(self.spec, blocks, level))]
            forces = {}
            for n, level in enumerate(wanted, start=1):
                # the graph serves the other levels and, in training, the loss; else it is freed on the way
                keep = differentiable or n < len(wanted)
                forces[level] = _forces(energies, positions, level, create_graph=differentiable, retain_graph=keep)
        planes = [
            [forces[level][i] if level in forces else torch.zeros_like(pos) for level in levels]
            for i, pos in enumerate(positions)
        ]
        return [
            Prediction(
                energy=e.energy if differentiable else e.energy.detach(),
                forces=torch.stack(plane, dim=1),
                terms=e.terms if differentiable else e.terms.detach(),
            )
            for e, plane in zip(energies, planes, strict=True)
        ]

    def _energies(self, block: AtomsBatch, pos: Tensor) -> Prediction:
        terms = self.net(block.species, block.topology.graph(pos, self.config.cutoff))
        return Prediction(energy=block.topology.sum_atoms(terms.sum(dim=1)), forces=None, terms=terms)


def _forces(energies: Sequence[Prediction], positions: Sequence[Tensor], level: int, **options: bool) -> list[Tensor]:
    """-dE/dpos [A, 3] of one level, for each block; `options` are those of autograd."""
    total = sum(e.energy[:, level].sum() for e in energies)
    return [-gradient for gradient in torch.autograd.grad(total, positions, **options)]


def _unlabelled(spec: DataSpec, blocks: Sequence[AtomsBatch], level: int) -> bool:
    """Do the blocks carry labels, but no force of this level?"""
    if level not in spec.force_levels or any(block.forces is None for block in blocks):
        return False
    plane = spec.force_levels.index(level)
    return all(bool(torch.isnan(block.forces[:, plane]).all()) for block in blocks)
