"""NeuralIL: power spectrum of the neighbour density in spherical Bessel functions, and one dense network for all.

Descriptors: Kocer, Mason, Erturk, AIP Advances 10, 015021 (2020). Network: Montes-Campos, Carrete, Bichelmaier, Varela,
Madsen, J. Chem. Inf. Model. 62, 88 (2022).

The double sum of Legendre polynomials over neighbours is, by the addition theorem, a product of moments of the density,
so that its cost is linear in the number of neighbours:

    A^a_nlm = sum_{j of element a} g_nl(r_j) Y_lm(r_j)        p^ab_nl = sum_m A^a_nlm A^b_nlm

Letters: R pairs (l, n) with 0 <= l, n and l + n <= n_max; C components (l, n, m); D length of the descriptor.
"""

import math
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.optimize import brentq
from scipy.special import spherical_jn
from torch import Tensor, nn

from hpcmlip.batch import DataSpec
from hpcmlip.config import Count, ModelSection, Positive
from hpcmlip.graph import Graph
from hpcmlip.models.layers import EnergyReadout, one_hot

COMPONENT = "NeuralIL: spherical Bessel power spectrum and a dense network"

_INSIDE = 0.95
"""The radial functions are cosine series in arccos(t), where t runs over this part of its range: derivatives are finite
at both ends."""


class Config(ModelSection):
    kind: Literal["neuralil"] = "neuralil"
    cutoff: Positive = 3.5
    n_max: Annotated[int, Field(ge=0)] = 4
    """Highest order l + n of the radial and angular functions."""
    embedding: Count = 2
    """Learnt numbers that tell the network the element of the atom."""
    core: Annotated[tuple[Count, ...], Field(min_length=1)] = (64, 32, 16, 16, 16)
    """Widths of the hidden layers; all but the first and the last are normalised."""


class Net(nn.Module):
    """Atomic energies from descriptor and element."""

    def __init__(self, config: Config, spec: DataSpec):
        super().__init__()
        self.descriptor = PowerSpectrum(config, len(spec.elements))
        self.embedding = nn.Embedding(len(spec.elements), config.embedding, dtype=torch.float32)
        widths = (self.descriptor.length + config.embedding, *config.core)
        last = len(config.core) - 1
        self.core = nn.ModuleList(_layer(*widths[i : i + 2], norm=0 < i < last) for i in range(len(config.core)))
        self.readout = EnergyReadout(config.core[-1], spec)

    def layers(self) -> list[list[nn.Parameter]]:
        """Parameters of the hidden layers, the first with the embedding, and of the energy head."""
        first, *others = [list(module.parameters()) for module in (*self.core, self.readout)]
        return [[*self.embedding.parameters(), *first], *others]

    def forward(self, species: Tensor, graph: Graph) -> Tensor:
        """[A] element indices -> [A, T = 2, L] eV."""
        x = torch.cat([self.descriptor(species, graph), self.embedding(species)], dim=1)
        for layer in self.core:
            x = layer(x)
        return self.readout(species, x)


class PowerSpectrum(nn.Module):
    """Invariants of the neighbour density of each unordered pair of elements."""

    def __init__(self, config: Config, num_elements: int):
        super().__init__()
        self._cutoff, self._num_elements, self._lmax = config.cutoff, num_elements, config.n_max
        orders = [ell for ell in range(config.n_max + 1) for _ in range(config.n_max + 1 - ell)]  # [R]
        components = [(row, ell * ell + m) for row, ell in enumerate(orders) for m in range(2 * ell + 1)]
        rows, harmonics = (torch.tensor(index) for index in zip(*components, strict=True))
        self.length = len(orders) * num_elements * (num_elements + 1) // 2
        # float64 as long as nobody casts them: at the cutoff, value and slope vanish to rounding
        series = torch.from_numpy(radial_series(config.n_max, config.cutoff))
        self.register_buffer("radial", series[:, rows], persistent=False)  # [terms, C]
        num_harmonics = int(harmonics.max()) + 1  # (lmax + 1)²
        angular = one_hot(harmonics, num_harmonics, torch.float64).T.contiguous()
        self.register_buffer("angular", angular, persistent=False)  # [(lmax + 1)², C]
        self.register_buffer("over_m", one_hot(rows, len(orders), torch.float64), persistent=False)  # [C, R]

    def forward(self, species: Tensor, graph: Graph) -> Tensor:
        """[A] element indices -> [A, D]: pairs of elements a <= b, for each the R invariants."""
        E, dtype = self._num_elements, graph.dist.dtype
        radial = cosines(graph.dist, self._cutoff, len(self.radial)) @ self.radial.to(dtype)
        angular = spherical_harmonics(graph.vec / graph.dist[..., None], self._lmax) @ self.angular.to(dtype)
        element = one_hot(graph.lift(species), E, dtype) * graph.mask[..., None]
        moments = graph.contract(element, radial * angular)  # [A, E, C]
        products = (moments[:, :, None] * moments[:, None]) @ self.over_m.to(dtype)  # [A, E, E, R]
        first, second = torch.triu_indices(E, E, device=species.device)
        return products.flatten(1, 2).index_select(1, first * E + second).flatten(1)


# ------------------------------------------------------------------------------------------------- radial functions


def cosines(dist: Tensor, cutoff: float, num: int) -> Tensor:
    """[...] Å -> [..., num] cos(k arccos t), t = 0.95 (2 r / R - 1): what `radial_series` gives the coefficients of."""
    angle = torch.arccos(_INSIDE * (2 / cutoff * dist - 1))
    return torch.cos(angle[..., None] * torch.arange(num, dtype=dist.dtype, device=dist.device))


def radial_series(n_max: int, cutoff: float) -> np.ndarray:
    """[terms, R] float64: coefficients of the radial functions by `cosines`, exact to rounding.

    The functions are entire, so the series converges faster than exponentially, and needs none of the care that
    spherical Bessel functions take near 0.
    """

    def values(t: np.ndarray) -> np.ndarray:
        return radial_functions(cutoff / 2 * (1 + t / _INSIDE), n_max, cutoff)

    series = np.polynomial.chebyshev.chebinterpolate(values, 40 + 4 * n_max)
    needed = np.abs(series).max(axis=1) > 1e-14 * np.abs(series).max()
    return series[: np.flatnonzero(needed)[-1] + 1]


def radial_functions(r: np.ndarray, n_max: int, cutoff: float) -> np.ndarray:
    """[..., R] float64 orthonormal functions g_nl of r [...] Å, ordered by l, then n; value and slope vanish at R.

    For each l, f_n combines two spherical Bessel functions so that both vanish, and g_n is f_n made orthogonal to those
    before it (Kocer et al., eqs. 4-9).
    """
    found = []
    for ell in range(n_max + 1):
        u = bessel_roots(ell, n_max + 2 - ell)
        j = (
            np.sign(r)[..., None] ** ell
            * spherical_jn(ell, np.abs(r)[..., None] * u / cutoff)
            / spherical_jn(ell + 1, u)
        )
        square = u * u
        root = np.sqrt(2 / (square[:-1] + square[1:]))
        f = cutoff**-1.5 * root * (u[1:] * j[..., :-1] - u[:-1] * j[..., 1:])
        g, d = [f[..., 0]], 1.0
        for n in range(1, n_max + 1 - ell):
            e = square[n - 1] * square[n + 1] / ((square[n - 1] + square[n]) * (square[n] + square[n + 1]))
            overlap = np.sqrt(e / d)
            d = 1 - e / d
            g.append((f[..., n] + overlap * g[-1]) / np.sqrt(d))
        found += g
    return np.stack(found, axis=-1)


def bessel_roots(ell: int, num: int) -> np.ndarray:
    """[num] first positive roots of the spherical Bessel function j_l; those of j_l and j_(l-1) interlace."""
    roots = np.pi * np.arange(1, num + ell + 1)
    for order in range(1, ell + 1):
        roots = np.array([brentq(lambda x, n=order: spherical_jn(n, x), *ends, xtol=1e-15) for ends in pairwise(roots)])
    return roots


# ----------------------------------------------------------------------------------------------- angular functions


def spherical_harmonics(unit: Tensor, lmax: int) -> Tensor:
    """[..., 3] unit vectors -> [..., (lmax + 1)²] real orthonormal harmonics, ordered by l; polynomials in x, y, z."""
    x, y, z = unit.movedim(-1, 0).contiguous()
    cos, sin = [torch.ones_like(x)], [torch.zeros_like(x)]  # real and imaginary part of (x + iy)^m
    for _ in range(lmax):
        cos, sin = [*cos, x * cos[-1] - y * sin[-1]], [*sin, x * sin[-1] + y * cos[-1]]
    legendre: dict[tuple[int, int], Tensor | float] = {}  # associated, by (l, m), without the power of sqrt(1 - z²)
    found = []
    for ell in range(lmax + 1):
        for m in range(ell):
            before = legendre.get((ell - 2, m), 0.0)
            legendre[ell, m] = ((2 * ell - 1) * z * legendre[ell - 1, m] - (ell + m - 1) * before) / (ell - m)
        legendre[ell, ell] = float(math.prod(range(1, 2 * ell, 2)))
        for m in range(ell + 1):
            norm = math.sqrt((2 * ell + 1) / (4 * math.pi) * math.factorial(ell - m) / math.factorial(ell + m))
            found += [norm * legendre[ell, 0] * cos[0]] if m == 0 else []
            found += [math.sqrt(2) * norm * legendre[ell, m] * part[m] for part in (cos, sin)] if m else []
    return torch.stack(found).movedim(0, -1)  # components first in memory: each is computed by itself


def _layer(num_in: int, num_out: int, *, norm: bool) -> nn.Sequential:
    dense = nn.Linear(num_in, num_out, dtype=torch.float32)
    nn.init.kaiming_normal_(dense.weight, nonlinearity="linear")  # LeCun's rule
    nn.init.zeros_(dense.bias)
    between = [nn.LayerNorm(num_out, dtype=torch.float32)] if norm else []
    return nn.Sequential(dense, *between, nn.SiLU())
