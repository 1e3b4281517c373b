"""`Potential`: a network of atomic energies turned into energies, conservative forces and stress.

Derivatives are taken inside `forward`, so that a wrapper such as the DeepSpeed engine sees one call with one backward
pass.

A network is the `Net` of a module in `hpcmlip/models/`: `Net(config, spec)`, called with element indices [A] and a
`Graph`, returns the energies [A, T, L] eV of the atoms in additive terms. A network that predicts forces by itself
(its config then names the limit "conservative") returns (energies, forces [A, L, 3] eV/Å). A network whose method
`layers()` gives its parameters, in lists from input to output, can have some of them frozen (transfer learning).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpcmlip import plugins
from hpcmlip.batch import AtomsBatch, DataSpec, Prediction
from hpcmlip.config import ModelSection
from hpcmlip.errors import ConfigError, DataError
from hpcmlip.models.compiled import Compiled


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
        self._compiled: Compiled | None = None

    def compile_forces(self) -> None:
        """Compile what training takes of molecules, energies and forces with their derivatives, where they lie now.

        That takes minutes. Raises ConfigError if it does not work.
        """
        if self.config.not_compiled:
            raise ConfigError(f"model '{self.config.kind}' is not compiled: {self.config.not_compiled}")
        self._compiled = Compiled(self.net, self.config.cutoff, len(self.spec.elements))
        weight = next(self.parameters())
        self._compiled.prepare(self.spec.force_levels, weight.dtype, weight.device)

    @property
    def is_conservative(self) -> bool:
        """Are the forces the gradient of the energy?"""
        return "conservative" not in self.config.limits

    def gives_forces(self, level: int) -> bool:
        """Does a level have forces? Those of a network that predicts them by itself must have been trained."""
        return self.is_conservative or level in self.spec.force_levels

    def forward(
        self, blocks: Sequence[AtomsBatch], *, force_levels: Sequence[int] | None = None, stress: bool = False
    ) -> list[Prediction]:
        """One prediction per block: energies [B, L] eV and forces [A, len(force_levels), 3] eV/Å, F = -dE/dpos.

        `force_levels` are indices into `spec.levels` (None: `spec.force_levels`; empty: no forces). With `stress` the
        predictions of periodic blocks have [B, len(force_levels), 3, 3] eV/Å³ of the same levels. One reverse pass a
        level serves all blocks together, since structures do not interact. A level of which no block has a force label
        by its `force_labels` is left out (unless compiled): its plane is 0. In training mode (and where gradients are
        on) the result can be differentiated. In evaluation mode it carries no graph if forces were asked for. Raises
        DataError for a periodic block if the model is for molecules only, and if a model that is not conservative is
        asked for stress or for forces of another level than `spec.force_levels`.
        """
        levels = self.spec.force_levels if force_levels is None else tuple(force_levels)
        differentiable = self.training and torch.is_grad_enabled()
        self._check(blocks, levels, stress)
        if not levels:
            return [_plain(self._evaluate(_Leaves(block, block.pos))) for block in blocks]
        if not self.is_conservative:
            return [_direct(self._evaluate(_Leaves(block, block.pos)), levels, differentiable) for block in blocks]
        wanted = [level for level in levels if not _unlabelled(self.spec, blocks, level)]
        if not (differentiable and wanted and self._compiled):
            return self._derive(blocks, levels, wanted, stress, differentiable)
        molecules = [Compiled.takes(block.topology) for block in blocks]
        rest = [block for block, is_molecules in zip(blocks, molecules, strict=True) if not is_molecules]
        derived = iter(self._derive(rest, levels, wanted, stress, differentiable) if rest else ())
        return [
            self._derive_compiled(block, levels) if is_molecules else next(derived)
            for block, is_molecules in zip(blocks, molecules, strict=True)
        ]

    def _derive(
        self,
        blocks: Sequence[AtomsBatch],
        levels: Sequence[int],
        wanted: Sequence[int],
        stress: bool,
        differentiable: bool,
    ) -> list[Prediction]:
        """Predictions with the derivatives of the wanted ones among the levels; the others are 0."""
        with torch.enable_grad():
            leaves = [_leaves(block, stress) for block in blocks]
            said = [self._evaluate(leaf) for leaf in leaves]
            slopes = {}
            for n, level in enumerate(wanted, start=1):
                # the graph serves the other levels and, in training, the loss; else it is freed on the way
                keep = differentiable or n < len(wanted)
                slopes[level] = _slopes(said, leaves, level, create_graph=differentiable, retain_graph=keep)
        return [
            Prediction(
                energy=s.energy if differentiable else s.energy.detach(),
                forces=_planes([-slopes[v][i].pos if v in slopes else None for v in levels], leaf.pos),
                terms=s.terms if differentiable else s.terms.detach(),
                stress=None
                if leaf.strain is None
                else _planes([slopes[v][i].strain if v in slopes else None for v in levels], leaf.strain)
                / torch.linalg.det(leaf.block.topology.cell).abs()[:, None, None, None],
            )
            for i, (s, leaf) in enumerate(zip(said, leaves, strict=True))
        ]

    def _derive_compiled(self, block: AtomsBatch, levels: Sequence[int]) -> Prediction:
        """Of molecules, which have no stress. All levels always: each choice of them would be compiled by itself."""
        energy, terms, *slopes = self._compiled(block.species, block.pos, block.topology, levels)
        return Prediction(energy, -torch.stack(slopes, dim=1), terms)

    def _check(self, blocks: Sequence[AtomsBatch], levels: Sequence[int], stress: bool) -> None:
        limits = self.config.limits
        if "periodic" in limits and any(block.topology.cell is not None for block in blocks):
            raise DataError(f"model '{self.config.kind}' does not compute periodic structures: {limits['periodic']}")
        if stress and not self.is_conservative:
            raise DataError(f"model '{self.config.kind}' gives no stress: {limits['conservative']}")
        for level in levels:
            if not self.gives_forces(level):
                raise DataError(
                    f"model '{self.config.kind}' gives no forces of {self.spec.levels[level]}, where it was trained on "
                    f"energies alone: {limits['conservative']}"
                )

    def _evaluate(self, leaf: "_Leaves") -> "_Said":
        pos, topology = leaf.pos, leaf.block.topology
        if leaf.strain is not None:
            strain = (leaf.strain + leaf.strain.transpose(1, 2)) / 2
            pos = pos + torch.bmm(topology.by_structure(pos), strain).flatten(0, 1)
            topology = topology.strained(strain)
        out = self.net(leaf.block.species, topology.graph(pos, self.config.cutoff))
        terms, forces = out if isinstance(out, tuple) else (out, None)
        return _Said(topology.sum_atoms(terms.sum(dim=1)), terms, forces)


@dataclass(frozen=True)
class _Leaves:
    """What the energies of a block are differentiated by."""

    block: AtomsBatch
    pos: Tensor
    strain: Tensor | None = None
    """[B, 3, 3], zeros."""


def _leaves(block: AtomsBatch, stress: bool) -> _Leaves:
    pos = block.pos if block.pos.requires_grad else block.pos.detach().requires_grad_()
    strained = stress and block.topology.cell is not None
    return _Leaves(block, pos, pos.new_zeros(block.num_structures, 3, 3).requires_grad_() if strained else None)


@dataclass(frozen=True)
class _Said:
    energy: Tensor
    """[B, L] eV."""
    terms: Tensor
    """[A, T, L] eV."""
    forces: Tensor | None
    """[A, L, 3] eV/Å of a network that predicts them by itself."""


@dataclass(frozen=True)
class _Slope:
    """dE/dpos [A, 3] and dE/dstrain [B, 3, 3] of one level of a block."""

    pos: Tensor
    strain: Tensor | None


def _slopes(said: Sequence[_Said], leaves: Sequence[_Leaves], level: int, **options: bool) -> list[_Slope]:
    """Of each block; `options` are those of autograd."""
    total = sum(s.energy[:, level].sum() for s in said)
    strains = [leaf.strain for leaf in leaves if leaf.strain is not None]
    found = torch.autograd.grad(
        total, [leaf.pos for leaf in leaves] + strains, allow_unused=True, materialize_grads=True, **options
    )
    by_strain = iter(found[len(leaves) :])
    return [
        _Slope(slope, None if leaf.strain is None else next(by_strain))
        for slope, leaf in zip(found, leaves, strict=False)
    ]


def _planes(planes: Sequence[Tensor | None], like: Tensor) -> Tensor:
    return torch.stack([torch.zeros_like(like) if plane is None else plane for plane in planes], dim=1)


def _plain(said: _Said) -> Prediction:
    return Prediction(said.energy, None, said.terms)


def _direct(said: _Said, levels: Sequence[int], differentiable: bool) -> Prediction:
    found = (said.energy, said.forces[:, list(levels)], said.terms)
    return Prediction(*(x if differentiable else x.detach() for x in found))


def _unlabelled(spec: DataSpec, blocks: Sequence[AtomsBatch], level: int) -> bool:
    """Is it known that no block has a force label of this level?"""
    if level not in spec.force_levels or any(block.force_labels is None for block in blocks):
        return False
    place = spec.force_levels.index(level)
    return not any(place in block.force_labels for block in blocks)
