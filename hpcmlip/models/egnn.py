"""EGNN with random Fourier features of the distance: messages of invariants, optionally moving coordinates.

Satorras, Hoogeboom, Welling, ICML 2021; Fourier features: Tancik et al., NeurIPS 2020. A layer is

    m_ij = phi_e(h_i, h_j, gamma(r_ij)) u(r_ij)        gamma(r) = [sin(b r), cos(b r)], b drawn once and frozen
    h_i <- h_i + phi_h(h_i, sum_j m_ij)
    x_i <- x_i + sum_j (x_i - x_j) / (r_ij + 1) phi_x(m_ij / u) u        only with `update_coords`

with an envelope u of the true distance that vanishes at the cutoff, and r_ij the distance after the moves so far; sums,
not means, for a mean over neighbours jumps where one leaves.

Letters: C copies of the atoms, one a level if the level of theory is a flag among the inputs, else a single one.
"""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import linear

from hpcmlip.batch import DataSpec
from hpcmlip.config import Count, ModelSection, Positive
from hpcmlip.graph import Graph
from hpcmlip.models.layers import HEAD_UNIT, AtomicOffset, cosine_cutoff, energy_head, one_hot, polynomial_cutoff

COMPONENT = "EGNN: invariant messages with random Fourier features of the distance, optional moving coordinates"

ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU}
ENVELOPES = {
    "polynomial": polynomial_cutoff,
    "cosine": cosine_cutoff,
    "none": lambda graph, _cutoff: graph.mask.to(graph.dist.dtype),
}


class Config(ModelSection):
    kind: Literal["egnn"] = "egnn"
    cutoff: Positive = 5.0
    layers: Count = 3
    features: Count = 128
    """Width of all layers."""
    fourier_features: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Half of them sines, half cosines."""
    fourier_sigma: Positive = 1.0
    """1/Å (1/Å² for `distance_sq`); standard deviation of the frequencies."""
    fourier_two_pi: bool = True
    """Are they frequencies (the phase is 2 pi b r) or angular frequencies (b r)?"""
    fourier_input: Literal["distance", "distance_sq"] = "distance"
    activation: Literal["silu", "relu"] = "silu"
    """With relu the forces jump wherever a unit switches: for energies only."""
    layer_norm: bool = True
    """LayerNorm before each activation of the messages and updates."""
    update_coords: bool = False
    """Layers but the last move the coordinates that the next one sees; forces remain the gradient of the energy."""
    envelope: Literal["polynomial", "cosine", "none"] = "polynomial"
    readout: Literal["atomwise", "pooled"] = "atomwise"
    """Energy of each atom, or one of the summed features of a structure (of which each atom then holds its part)."""
    levels: Literal["heads", "flag"] = "heads"
    """Levels of theory: heads on one network, or a flag among the inputs of an atom, which costs a pass a level."""

    @model_validator(mode="after")
    def _check(self):
        if self.update_coords and self.layers < 2:
            raise ValueError("update_coords needs 2 layers or more: the last does not move the coordinates")
        return self

    @property
    def limits(self) -> dict[str, str]:
        found = {}
        if self.envelope == "none":
            found["smooth_cutoff"] = "envelope none: messages end abruptly at the cutoff"
        if self.readout == "pooled":
            found["additivity"] = "readout pooled: the energy is not linear in the sum over atoms"
            found["periodic"] = "readout pooled: the energy would depend on the choice of the cell"
        return found


class Net(nn.Module):
    """Energies of every level of theory: the constant part and one learnt term."""

    def __init__(self, config: Config, spec: DataSpec):
        super().__init__()
        self.config, self.num_elements = config, len(spec.elements)
        self.num_flags = len(spec.levels) if config.levels == "flag" else 0
        F = config.features
        self.embed = nn.Linear(self.num_elements + self.num_flags, F, dtype=torch.float32)
        self.layers = nn.ModuleList(
            Layer(config, moves=config.update_coords and n < config.layers) for n in range(1, config.layers + 1)
        )
        self.offset = AtomicOffset(spec)
        self.readout = nn.Sequential(
            nn.Linear(F, F, dtype=torch.float32),
            ACTIVATIONS[config.activation](),
            energy_head(F, 1 if self.num_flags else len(spec.levels)),
        )

    def forward(self, species: Tensor, graph: Graph) -> Tensor:
        """[A] element indices -> [A, T = 2, L] eV."""
        h = self.embed(self._inputs(species, graph.dist.dtype))
        envelope = ENVELOPES[self.config.envelope](graph, self.config.cutoff)
        vec, dist = graph.vec[:, :, None], graph.dist[:, :, None]  # [A, K, C, 3] Å, [A, K, C] Å
        for layer in self.layers:
            h, vec, dist = layer(h, vec, dist, envelope, graph)
        return torch.stack([self.offset(species), self._learnt(h, graph)], dim=1) * HEAD_UNIT

    def _inputs(self, species: Tensor, dtype: torch.dtype) -> Tensor:
        """[A] -> [A, C, inputs]: one-hot of the element and, as copies, of each level."""
        elements = one_hot(species, self.num_elements, dtype)[:, None]
        if not self.num_flags:
            return elements
        flags = torch.eye(self.num_flags, dtype=dtype, device=elements.device)
        return torch.cat([elements.expand(-1, self.num_flags, -1), flags.expand(species.shape[0], -1, -1)], dim=2)

    def _learnt(self, h: Tensor, graph: Graph) -> Tensor:
        """[A, C, F] -> [A, L] in `HEAD_UNIT`: of copies one value each, of a single copy all heads."""
        if self.config.readout == "atomwise":
            return self.readout(h).flatten(1)
        structure = self.readout(graph.topology.sum_atoms(h)).flatten(1)
        return graph.topology.lift_structures(structure / graph.topology.num_atoms)


class Layer(nn.Module):
    """One round of messages; with `moves` also one of the coordinates."""

    def __init__(self, config: Config, *, moves: bool):
        super().__init__()
        F, R = config.features, config.fourier_features
        scale = config.fourier_sigma * (2 * math.pi if config.fourier_two_pi else 1.0)
        self.register_buffer("frequencies", scale * torch.randn(R // 2, dtype=torch.float32))
        self.power = {"distance": 1, "distance_sq": 2}[config.fourier_input]
        self.pair = nn.Linear(2 * F + R, F, dtype=torch.float32)
        self.message = nn.Sequential(*_activated(config), nn.Linear(F, F, dtype=torch.float32), *_activated(config))
        self.update = nn.Sequential(
            nn.Linear(2 * F, F, dtype=torch.float32),
            *_activated(config),
            nn.Linear(F, F, dtype=torch.float32),
            *_activated(config),
        )
        self.step = _step_sizes(config) if moves else None

    def forward(
        self, h: Tensor, vec: Tensor, dist: Tensor, envelope: Tensor, graph: Graph
    ) -> tuple[Tensor, Tensor, Tensor]:
        """h [A, C, F], vec [A, K, C, 3] Å, dist [A, K, C] Å -> the same after the layer; envelope [A, K]."""
        message = self.message(self._pairs(h, dist, graph))  # [A, K, C, F]
        total = graph.contract(envelope[..., None], message.flatten(2)).reshape(h.shape)
        h = h + self.update(torch.cat([h, total], dim=-1))
        if self.step is not None:
            pull = self.step(message) * (envelope[..., None] / (dist + 1))[..., None]  # [A, K, C, 1]
            moved = -graph.sum(pull * vec)  # [A, C, 3]
            # edge by edge, for a neighbour may be an image: it moves as the atom that it is an image of
            vec = vec + graph.lift(moved) - moved[:, None]
            dist = torch.sqrt((vec * vec).sum(-1) + 1e-6)  # Å², since atoms may be moved onto each other
        return h, vec, dist

    def _pairs(self, h: Tensor, dist: Tensor, graph: Graph) -> Tensor:
        """[A, K, C, F]: `pair` of [h_i, h_j, gamma(r_ij)], the part of each atom computed once."""
        F, R = h.shape[-1], 2 * len(self.frequencies)
        receiver, sender, radial = self.pair.weight.split([F, F, R], dim=1)
        phase = (dist**self.power)[..., None] * self.frequencies
        fourier = torch.cat([torch.sin(phase), torch.cos(phase)], dim=-1)
        return linear(h, receiver, self.pair.bias)[:, None] + graph.lift(linear(h, sender)) + linear(fourier, radial)


def _activated(config: Config) -> list[nn.Module]:
    norm = [nn.LayerNorm(config.features, dtype=torch.float32)] if config.layer_norm else []
    return [*norm, ACTIVATIONS[config.activation]()]


def _step_sizes(config: Config) -> nn.Sequential:
    """phi_x; it starts near 0 so that the coordinates start near the true ones."""
    last = nn.Linear(config.features, 1, bias=False, dtype=torch.float32)
    nn.init.xavier_uniform_(last.weight, gain=1e-3)
    return nn.Sequential(
        nn.Linear(config.features, config.features, dtype=torch.float32), ACTIVATIONS[config.activation](), last
    )
