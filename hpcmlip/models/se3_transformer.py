"""SE(3)-Transformer: attention between atoms whose keys and values are equivariant maps of the senders' tensors.

Fuchs, Worrall, Fischer, Welling, NeurIPS 2020. With features f of degrees l = 0 ... `max_degree` (layout of
`tensors.py`), direction u and distance r from receiver i to sender j, a layer is

    q_i = W_Q f_i,    k_ij = W_K(r u) f_j,    v_ij = W_V(r u) f_j
    alpha_ij = c(r_ij) exp(s_ij) / (1 + sum_j' c(r_ij') exp(s_ij')),    s_ij = <q_i, k_ij> / sqrt(d)
    f_i <- W_S f_i + W_O sum_j alpha_ij c(r_ij) v_ij

for each head, a part of the channels. The kernel from degree k to l is W^{lk} = sum_J psi_J^{lk}(r) W_J(u), W_J the
Clebsch-Gordan combination of the harmonics of degree J. A radial network that gave psi for every pair of channels would
cost c² numbers an edge and path. Here psi is of low rank: in the frame of the edge the same kernels are matrices A_m
and B_m between components of equal |m| (`tensors.EdgeKernel`), which are plain weights with all pairs of channels;
the radial network weights the inputs, rho_{k,|m|,c}(r). Keys and values share the turned and weighted inputs.

Two departures from the paper make energies smooth. A softmax over neighbours jumps where one crosses the cutoff: the
envelope c (`bump_cutoff`) and the 1 in the denominator, a neighbour of logit 0 that sends nothing, let it fade. And
ReLU(LN(|f|)) f / |f| between the layers jumps where f passes through zero: see `NormNonlinearity`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from hpcmlip.batch import DataSpec
from hpcmlip.config import Count, ModelSection, Positive
from hpcmlip.graph import Graph
from hpcmlip.models.layers import HEAD_UNIT, EnergyReadout, bump_cutoff, mlp, one_hot
from hpcmlip.models.tensors import DegreeLinear, EdgeFrames, EdgeKernel, Frames

COMPONENT = "SE(3)-Transformer: equivariant attention on tensors up to degree 3, conservative or direct forces"

NORM_EPS = 1e-6
"""Norms are sqrt(|f|² + eps²): a finite gradient where a tensor vanishes."""

SILU_GAIN = 1.677
"""silu(x) times this has unit second moment for a normal x."""


class Config(ModelSection):
    kind: Literal["se3_transformer"] = "se3_transformer"
    cutoff: Positive = 5.0
    max_degree: Annotated[int, Field(ge=0, le=3)] = 2
    """Highest degree of the tensors between the layers."""
    layers: Count = 3
    channels: Count = 16
    """Tensors of each degree."""
    heads: Count = 8
    """Attention heads; the channels are divided among them."""
    radial_functions: Count = 8
    """Spherical Bessel functions that the radial networks see of a distance."""
    radial_hidden: Count = 32
    """Width of the two hidden layers of the radial networks, and of the one of attentive self-interaction."""
    self_interaction: Literal["linear", "attentive"] = "linear"
    """How an atom's tensors pass to the next layer: by one matrix for each degree, or by one that a network makes of
    the scalar products of that degree's channels."""
    parity: bool = False
    """Only couplings that keep parity, which makes mirror images equal; False: all those of SO(3)."""
    forces: Literal["conservative", "direct"] = "conservative"
    """The gradient of the energy, or an output of degree 1, cheaper and not a gradient."""
    remove_mean_force: bool = False
    """direct: subtract from the forces their mean over the structure."""

    @model_validator(mode="after")
    def _check(self):
        if self.channels % self.heads:
            raise ValueError(f"channels {self.channels} cannot be divided among heads {self.heads}; take a multiple")
        if self.forces == "direct" and not self.max_degree:
            raise ValueError("forces: direct needs tensors of degree 1; set max_degree to 1, 2 or 3")
        if self.remove_mean_force and self.forces == "conservative":
            raise ValueError("conservative forces have no mean; remove_mean_force goes with forces: direct")
        return self

    @property
    def limits(self) -> dict[str, str]:
        found = {}
        # it takes a tensor of the second layer to form a pseudoscalar
        if not self.parity and self.max_degree and self.layers > 1:
            found["reflection"] = "couplings of odd parity tell mirror images apart; parity: true leaves them out"
        if self.forces == "direct":
            found["conservative"] = "forces are an output by themselves; forces: conservative takes the gradient"
        if self.remove_mean_force:
            found["additivity"] = "the mean force of a structure couples all its atoms (remove_mean_force)"
        return found

    @property
    def not_compiled(self) -> str:
        return "the compiler works on its tensor products for a quarter of an hour, and they are not faster then"


class Net(nn.Module):
    """Atomic energies of every level from the scalars of the last layer; direct forces from its vectors."""

    def __init__(self, config: Config, spec: DataSpec):
        super().__init__()
        C, L = config.channels, config.max_degree
        self.config, self.num_elements = config, len(spec.elements)
        is_direct = config.forces == "direct"
        degrees = [0] + [L] * (config.layers - 1) + [int(is_direct)]
        self.embed = nn.Linear(self.num_elements, C, bias=False, dtype=torch.float32)
        self.frames = EdgeFrames(L)
        self.attention = nn.ModuleList(AttentionLayer(config, *pair) for pair in pairwise(degrees))
        self.between = nn.ModuleList(NormNonlinearity(degree, C) for degree in degrees[1:-1])
        self.last = nn.Linear(C, C, dtype=torch.float32)
        self.energy = EnergyReadout(C, spec)
        self.force = ForceReadout(config, len(spec.levels)) if is_direct else None

    def forward(self, species: Tensor, graph: Graph) -> Tensor | tuple[Tensor, Tensor]:
        """[A] element indices -> [A, T = 2, L] eV; with direct forces also [A, L, 3] eV/Å."""
        features = self.features(species, graph)[-1]
        terms = self.energy(species, silu(self.last(features[:, 0])))
        return terms if self.force is None else (terms, self.force(features[:, 1:4], graph))

    def features(self, species: Tensor, graph: Graph) -> list[Tensor]:
        """[A, M, C] of each layer's output, before the nonlinearity."""
        x = self.embed(one_hot(species, self.num_elements, graph.dist.dtype))[:, None]
        edges = Edges(
            self.frames(graph),
            bessel_functions(graph.dist, self.config.cutoff, self.config.radial_functions),
            bump_cutoff(graph, self.config.cutoff),
        )
        found = []
        for n, layer in enumerate(self.attention):
            found.append(layer(x, edges))
            x = self.between[n](found[-1]) if n < len(self.between) else x
        return found


@dataclass(frozen=True)
class Edges:
    """What all layers see of the geometry."""

    frames: Frames
    radial: Tensor
    """[A, K, R] functions of the distance."""
    envelope: Tensor
    """[A, K] cutoff function, 0 where there is no neighbour."""


class AttentionLayer(nn.Module):
    """Tensors up to `degree_in` -> tensors up to `degree_out`: multi-head attention and self-interaction."""

    def __init__(self, config: Config, degree_in: int, degree_out: int):
        super().__init__()
        C = config.channels
        self.degree_in, self.degree_out, self.heads, self.channels = degree_in, degree_out, config.heads, C
        self.scale = ((degree_in + 1) ** 2 * C / config.heads) ** -0.5
        self.query = DegreeLinear(degree_in, C)
        self.kernel = EdgeKernel(degree_in, (degree_in, degree_out), C, even=config.parity)
        hidden = config.radial_hidden
        self.radial = radial_network([config.radial_functions, hidden, hidden, self.kernel.num_radial * C])
        self.out = DegreeLinear(degree_out, C)
        kept = min(degree_in, degree_out)
        self.own = AttentiveLinear(kept, C, hidden) if config.self_interaction == "attentive" else DegreeLinear(kept, C)

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """[A, M_in, C] -> [A, M_out, C]."""
        received = self.out(self.messages(x, edges))
        kept = self.own(x[:, : received.shape[1]])
        return received + pad(kept, (0, 0, 0, received.shape[1] - kept.shape[1]))

    def messages(self, x: Tensor, edges: Edges) -> Tensor:
        """[A, M_in, C] -> [A, M_out, C]: the heads side by side."""
        frames, D = edges.frames, self.degree_in
        radial = self.radial(edges.radial).unflatten(-1, (self.kernel.num_radial, -1))
        keys, values = self.kernel(frames.turn_neighbours(x, D), radial)
        products = (frames.turn(self.query(x), D) * keys).sum(dim=2)
        logits = products.unflatten(-1, (self.heads, -1)).sum(dim=-1) * self.scale
        weights = attention_weights(logits, edges.envelope) * edges.envelope[..., None]
        weighted = values * weights.repeat_interleave(self.channels // self.heads, dim=-1)[:, :, None]
        return frames.collect(weighted, self.degree_out, min(D, self.degree_out))


class AttentiveLinear(nn.Module):
    """Mixes the channels of each degree by a matrix that a network makes of their scalar products."""

    def __init__(self, degree: int, channels: int, hidden: int):
        super().__init__()
        self.networks = nn.ModuleList(mlp([channels**2, hidden, channels**2], nn.SiLU) for _ in range(degree + 1))

    def forward(self, x: Tensor) -> Tensor:
        """[A, M, C] -> [A, M, C]."""
        C, found = x.shape[-1], []
        for ell, network in enumerate(self.networks):
            part = x[:, ell * ell : (ell + 1) ** 2]
            products = torch.bmm(part.transpose(1, 2), part) / (2 * ell + 1)
            found.append(torch.bmm(part, network(products.flatten(1)).unflatten(1, (C, C))))
        return torch.cat(found, dim=1)


class NormNonlinearity(nn.Module):
    """Scalars: silu(LN(f)). Degrees above: f^ = f / sqrt(1 + mean |f|²), then f^ sigmoid(a |f^| + b) for each channel.

    The mean is over channels and components. Smooth where tensors vanish, as they do in symmetric structures, and
    bounded, so that the attention of the next layer is well scaled.
    """

    def __init__(self, degree: int, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels, dtype=torch.float32)
        self.slopes = nn.ParameterList(torch.ones(channels, dtype=torch.float32) for _ in range(degree))
        self.shifts = nn.ParameterList(torch.zeros(channels, dtype=torch.float32) for _ in range(degree))

    def forward(self, x: Tensor) -> Tensor:
        """[A, M, C] -> [A, M, C]."""
        found = [silu(self.norm(x[:, :1]))]
        for ell, (slope, shift) in enumerate(zip(self.slopes, self.shifts, strict=True), start=1):
            part = x[:, ell * ell : (ell + 1) ** 2]
            part = part / torch.sqrt(1 + part.square().mean(dim=(1, 2), keepdim=True))
            norm = torch.sqrt(part.square().sum(dim=1, keepdim=True) + NORM_EPS**2)
            found.append(part * torch.sigmoid(slope * norm + shift))
        return torch.cat(found, dim=1)


class ForceReadout(nn.Module):
    """Vectors of an atom -> its force at each level, with the mean of the structure removed if asked for."""

    def __init__(self, config: Config, num_levels: int):
        super().__init__()
        self.remove_mean = config.remove_mean_force
        self.head = nn.Linear(config.channels, num_levels, bias=False, dtype=torch.float32)

    def forward(self, vectors: Tensor, graph: Graph) -> Tensor:
        """[A, 3, C] -> [A, L, 3] eV/Å."""
        forces = self.head(vectors).transpose(1, 2) * HEAD_UNIT
        if not self.remove_mean:
            return forces
        topology = graph.topology
        return forces - topology.lift_structures(topology.by_structure(forces).mean(dim=1))


def attention_weights(logits: Tensor, envelope: Tensor) -> Tensor:
    """[A, K, H], [A, K] -> [A, K, H]: c exp(s) / (1 + sum c exp(s)), over the neighbours."""
    c = envelope[..., None]
    # shifted by the largest logit, that of the 1 included; the shift cancels: no derivative needed
    top = logits.detach().masked_fill(c == 0, 0).amax(dim=1, keepdim=True).clamp(min=0)
    weights = c * torch.exp(torch.where(c == 0, 0, logits - top))
    # the floor matters where the largest logit, far beyond 40, is that of a neighbour at the cutoff: not 0 / 0 then;
    # its square, in the derivative, is still a number in float32
    total = (weights.sum(dim=1, keepdim=True) + torch.exp(-top)).clamp(min=1e-18)
    return weights / total


def radial_network(sizes: Sequence[int]) -> nn.Sequential:
    """Dense layers with SiLU that start with outputs of unit size: the usual start hardly depends on the distance."""
    network = mlp(sizes, nn.SiLU)
    gain = 1.0
    for layer in network[::2]:
        nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
        gain = SILU_GAIN
    return network


def bessel_functions(dist: Tensor, cutoff: float, num: int) -> Tensor:
    """[A, K, num] sqrt(2R) sin(n pi r / R) / r, of unit size (Gasteiger, Groß, Günnemann, ICLR 2020, times R)."""
    n = torch.arange(1, num + 1, dtype=dist.dtype, device=dist.device)
    return math.sqrt(2 * cutoff) * torch.sin(dist[..., None] * n * (math.pi / cutoff)) / dist[..., None]
