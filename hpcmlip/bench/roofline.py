"""What a training step of HIP-NN must compute and move, and how fast this machine does such things.

Counted are the matrix products, by formula. A bilinear product of which both factors depend on the positions is needed
9 times in a step on energies and forces (1 forward, 2 for the forces, 4 + 2 for the gradients), a dense layer 6 times
(1, 1 and 2 + 2). Everything else (activations, norms, sums, copies) is counted from the step as it runs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpcmlip.bench.stepping import Step, Timer, milliseconds, ratio, timer
from hpcmlip.models.hipnn import Net, Residual, sums_first

SQUARE = 1024
"""Rows and columns of the matrices whose product gives the matrix rate."""
STREAM = 8 * 2**20
"""Numbers in each of the three arrays that give the bandwidth: 96 MiB together, as much as a step touches."""


@dataclass(frozen=True)
class Product:
    """`times` products [rows, inner] x [inner, columns] of each of `batch` pairs of matrices."""

    name: str
    batch: int
    rows: int
    inner: int
    columns: int
    times: int

    @property
    def operations(self) -> int:
        """Multiplications and additions."""
        return 2 * self.times * self.batch * self.rows * self.inner * self.columns

    @property
    def bytes(self) -> int:
        """Of float32 factors and results, each read or written once."""
        area = self.rows * self.inner + self.inner * self.columns + self.rows * self.columns
        return 4 * self.times * self.batch * area

    def once(self, device) -> Callable[[], list[Tensor]]:
        """The product itself and by each of its factors, as they come in a step: a third of `times` = 3."""
        a, b, c = (
            torch.randn(self.batch, *shape, device=device).squeeze(0)
            for shape in ((self.rows, self.inner), (self.inner, self.columns), (self.rows, self.columns))
        )
        return lambda: [a @ b, c @ b.mT, a.mT @ c]


def products(net: Net, A: int, K: int) -> list[Product]:
    """Those of a step on A atoms with K neighbour slots, one level of theory."""
    found = [Product("constant energies", 1, A, net.num_elements, 1, times=1)]
    for (interaction, *atom_layers), head in zip(net.blocks, net.heads, strict=True):
        base = interaction.base
        V, F, num_in = base.weight.shape
        M = (net.lmax + 1) ** 2
        of_elements = interaction is net.blocks[0][0]  # whose features do not depend on positions
        found.append(Product("radial arguments", 1, A * K, 1, V, times=6))
        if sums_first(base.weight.shape, K, M):
            found.append(Product("neighbours", A, M * num_in, K, V, times=9))
            found.append(Product("weights", 1, A * M, num_in * V, F, times=6))
        else:
            # the elements need no derivative on the way to the forces (`fused.product` takes it all the same: 7, not 6)
            found.append(Product("weights", 1, A, num_in, V * F, times=2 if of_elements else 6))
            found.append(Product("filter", A, K, V, F, times=7 if of_elements else 9))
            found.append(Product("neighbours", A, M, K, F, times=9))
        found.append(Product("own features", 1, A, num_in, F, times=2 if of_elements else 6))
        for layer in (interaction, *atom_layers):
            if isinstance(layer, Residual):
                found.append(Product("dense", 1, A, F, F, times=6))
                if isinstance(layer.skip, torch.nn.Linear):
                    found.append(Product("skip", 1, A, num_in, F, times=2 if of_elements else 6))
        found += [Product("dense", 1, A, F, F, times=6) for _ in atom_layers]
        found.append(Product("head", 1, A, F, head.out_features, times=5))
    return found


def timers(needed: Sequence[Product], device) -> dict[str, Timer]:
    """Of all products of a step, of one large matrix product, and of a triad over long arrays."""
    runs = [(math.ceil(p.times / 3), p.once(device)) for p in needed if p.times >= 3]
    a, b = torch.randn(2, SQUARE, SQUARE, device=device)
    x, y, z = torch.randn(3, STREAM, device=device)

    def all_products():
        for times, once in runs:
            for _ in range(times):
                once()

    return {
        "products": timer(all_products),
        "matrix": timer(lambda: a @ b),
        "triad": timer(lambda: torch.add(x, y, alpha=2.0, out=z)),
    }


class _Rest(TorchDispatchMode):
    """Counts the operations that are no matrix products, and the bytes of what they read and write."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.is_view or "mm" in func.name():
            return out
        tensors = [x for x in (*args, *(kwargs or {}).values(), *_tuple(out)) if isinstance(x, Tensor)]
        self.operations += 1
        self.bytes += sum(x.untyped_storage().nbytes() if 0 in x.stride() else x.nbytes for x in tensors)
        return out


def rest(step: Step) -> tuple[int, int]:
    """(number, bytes) of the other operations in a step."""
    with _Rest() as counted:
        step()
    return counted.operations, counted.bytes


def account(needed: Sequence[Product], other: tuple[int, int], seconds: Mapping[str, Sequence[float]]) -> dict:
    """The limit and how near the step "hpcmlip" comes to it; `seconds` are those of turns taken together."""
    rate = 2 * SQUARE**3 / (1e-3 * milliseconds(seconds["matrix"]))
    bandwidth = 12 * STREAM / (1e-3 * milliseconds(seconds["triad"]))
    bound = sum(max(p.operations / rate, p.bytes / bandwidth) for p in needed)
    step = milliseconds(seconds["hpcmlip"])
    num_other, other_bytes = other
    return {
        "operations": sum(p.operations for p in needed),
        "products_bytes": sum(p.bytes for p in needed),
        "matrix_gflops": round(1e-9 * rate, 1),
        "bandwidth_gb_per_s": round(1e-9 * bandwidth, 1),
        "bound_milliseconds": round(1e3 * bound, 2),
        "bound_fraction": round(1e3 * bound / step, 3),
        "products_milliseconds": milliseconds(seconds["products"]),
        "products_fraction": ratio(seconds["products"], seconds["hpcmlip"])[0],
        "other_operations": num_other,
        "other_bytes": other_bytes,
        "other_milliseconds": round(1e3 * other_bytes / bandwidth, 2),
    }


def rows(found: dict) -> list[tuple[str, str, str]]:
    """Lines (what, how much, ms) of a table."""
    operations, moved = 1e-9 * found["operations"], 1e-6 * found["products_bytes"]
    return [
        (
            "limit of the products",
            f"{operations:.2f} GFLOP at {found['matrix_gflops']:.0f} GFLOP/s, "
            f"{moved:.0f} MB at {found['bandwidth_gb_per_s']:.0f} GB/s",
            f"{found['bound_milliseconds']:.1f}",
        ),
        ("the products alone", "the same shapes, nothing else", f"{found['products_milliseconds']:.1f}"),
        (
            "all other operations",
            f"{found['other_operations']}, {1e-6 * found['other_bytes']:.0f} MB at that bandwidth",
            f"{found['other_milliseconds']:.1f}",
        ),
    ]


def _tuple(out) -> tuple:
    return tuple(out) if isinstance(out, tuple | list) else (out,)
