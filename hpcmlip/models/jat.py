"""JAT: GATv2 attention over the neighbours within a cutoff, the distance among the arguments of the logits.

Brody, Alon, Yahav, ICLR 2022 (GATv2). A layer is, for each head,

    s_ij = a . silu(W_r h_i + W_s h_j) + sum_n c_n x(r_ij)^n R        n = 1 ... heads
    alpha_ij = u_ij exp(s_ij) / sum_k u_ik exp(s_ik)                k = i included, u_ii = 1, r_ii = 0
    h_i <- norm(h_i + silu(alpha_ii W_r h_i + sum_j alpha_ij W_s h_j))

with a cutoff function u. The edge of an atom to itself keeps the denominator positive, so that a neighbour may fade
out. It carries W_r h_i, not W_s h_i: of equal features any weighted mean is the same, and a molecule of one element
(H2) would have the same energy at all distances.

Letters: H heads, D features of a head.
"""

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import silu

from hpcmlip.batch import DataSpec
from hpcmlip.config import Count, ModelSection, Positive
from hpcmlip.graph import Graph
from hpcmlip.models.layers import HEAD_UNIT, AtomicOffset, one_hot, polynomial_cutoff

COMPONENT = "JAT: sparse GATv2 attention with distances in the logits"

EDGE_FEATURES = {
    "d": lambda dist, cutoff: dist / cutoff,
    "d2": lambda dist, cutoff: (dist / cutoff).square(),
    "smooth_inverse": lambda dist, _cutoff: 1 / (1 + dist),
}


class Config(ModelSection):
    kind: Literal["jat"] = "jat"
    cutoff: Positive = 5.0
    layers: Count = 6
    features: Count = 48
    """Width of a head."""
    heads: Count = 4
    edge_feature: Literal["d", "d2", "smooth_inverse"] = "d"
    """Of a distance r in units of the cutoff: r, r²; smooth_inverse: 1 / (1 + r/Å). The logits are polynomials in it
    of the order of the number of heads."""
    smooth: bool = True
    """Weigh each neighbour by a function that vanishes at the cutoff."""
    update: Literal["skip", "gru"] = "skip"
    """What brings the messages into an atom's features: an addition or a gated recurrent unit."""
    readout: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 32, 16, 16)
    """Widths of the layers from an atom's features to its energy."""

    @property
    def limits(self) -> dict[str, str]:
        return {} if self.smooth else {"smooth_cutoff": "smooth false: attention ends abruptly at the cutoff"}


class Net(nn.Module):
    """Atomic energies of every level of theory: the constant part and one learnt term."""

    def __init__(self, config: Config, spec: DataSpec):
        super().__init__()
        self.config, self.num_elements = config, len(spec.elements)
        self.embed = _projection(self.num_elements, config.features)
        # all heads start from the same features
        self.layers = nn.ModuleList(
            Layer(config, num_in=config.features * (config.heads if n else 1), norm=n < config.layers - 1)
            for n in range(config.layers)
        )
        self.readout = _pyramid([config.heads * config.features, *config.readout])
        self.offset = AtomicOffset(spec)
        # eV and not damped: of the normalised features geometry is but a few percent, and behind the small head of
        # other models training stays at the energy of the mean geometry for long
        self.head = nn.Linear(config.readout[-1], len(spec.levels), dtype=torch.float32)

    def forward(self, species: Tensor, graph: Graph) -> Tensor:
        """[A] element indices -> [A, T = 2, L] eV."""
        h = self.embed(one_hot(species, self.num_elements, graph.dist.dtype))[:, None]
        envelope = polynomial_cutoff(graph, self.config.cutoff) if self.config.smooth else graph.mask.to(h.dtype)
        edges, own_edge = self._edge_features(graph.dist), self._edge_features(graph.dist.new_zeros(()))
        for layer in self.layers:
            h = layer(h, edges, own_edge, envelope, graph)
        return torch.stack([self.offset(species) * HEAD_UNIT, self.head(self.readout(h.flatten(1)))], dim=1)

    def _edge_features(self, dist: Tensor) -> Tensor:
        """[...] Å -> [..., H]: powers of the edge feature, at the scale of Å for logits that tell distances apart."""
        R = self.config.cutoff
        x = EDGE_FEATURES[self.config.edge_feature](dist, R)
        return torch.stack([R * x**n for n in range(1, self.config.heads + 1)], dim=-1)


class Layer(nn.Module):
    """One round of attention."""

    def __init__(self, config: Config, *, num_in: int, norm: bool):
        super().__init__()
        H, D = config.heads, config.features
        self.receiver, self.sender = _projection(num_in, H * D), _projection(num_in, H * D)
        self.pair_score, self.edge_score = _projection(H * D, H), _projection(H, H)
        self.gru = nn.GRUCell(H * D, H * D, dtype=torch.float32) if config.update == "gru" else None
        self.norm = nn.LayerNorm(D, dtype=torch.float32) if norm else nn.Identity()

    def forward(self, h: Tensor, edges: Tensor, own_edge: Tensor, envelope: Tensor, graph: Graph) -> Tensor:
        """h [A, H or 1, D], edges [A, K, H], own_edge [H], envelope [A, K] -> [A, H, D]."""
        received, sent = self.receiver(h.flatten(1)), self.sender(h.flatten(1))  # [A, HD]
        lifted = graph.lift(sent)  # [A, K, HD]
        own, weight = attention(
            self.logits(received + sent, own_edge.expand(h.shape[0], -1)),
            self.logits(received[:, None] + lifted, edges),
            envelope,
        )
        by_head = (weight.shape[-1], -1)
        message = torch.einsum("akh,akhd->ahd", weight, lifted.unflatten(2, by_head))
        new = silu(message + own[..., None] * received.unflatten(1, by_head))
        if self.gru is None:
            return self.norm(h + new)
        return self.norm(self.gru(new.flatten(1), h.expand_as(new).flatten(1)).reshape(new.shape))

    def logits(self, pair: Tensor, edges: Tensor) -> Tensor:
        """[..., HD] (W_r h_i + W_s h_j), [..., H] -> [..., H]."""
        return self.pair_score(silu(pair)) + self.edge_score(edges)


def attention(own: Tensor, logits: Tensor, envelope: Tensor) -> tuple[Tensor, Tensor]:
    """Weights u exp(s) / sum of u exp(s) of an atom itself [A, H], where u = 1, and of its neighbours [A, K, H].

    `own` [A, H] and `logits` [A, K, H] are s, `envelope` [A, K] is u.
    """
    u = envelope[..., None]
    # a common shift cancels in the quotient: no derivative needed
    top = torch.maximum(own, logits.masked_fill(u <= 0, -torch.inf).amax(dim=1)).detach()
    weight = u * torch.exp(torch.where(u > 0, logits - top[:, None], 0.0))
    own = torch.exp(own - top)
    total = own + weight.sum(dim=1)
    return own / total, weight / total[:, None]


def _projection(num_in: int, num_out: int) -> nn.Linear:
    layer = nn.Linear(num_in, num_out, bias=False, dtype=torch.float32)
    nn.init.orthogonal_(layer.weight)
    return layer


def _pyramid(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out, bias=False, dtype=torch.float32)]
        layers += [nn.LayerNorm(num_out, dtype=torch.float32), nn.SiLU()]
    return nn.Sequential(*layers)
