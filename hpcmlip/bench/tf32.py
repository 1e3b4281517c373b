"""What TF32 would do to the energies and forces of a trained model, found without a GPU.

TF32 products round their inputs to ten bits after the leading one and add in float32. Here the inputs of every matrix
product, those of the reverse pass included, are rounded so; the rest is float32. Compared with float64 on structures of
the validation split, as the errors of float32 are.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.loader import split_batches
from hpcmlip.models.export import load_model
from hpcmlip.models.potential import Potential
from hpcmlip.training.errors import batch_errors
from hpcmlip.units import KCAL_PER_MOL

COMPONENT = "errors of energies and forces if products were in TF32"
BATCHES = 20
DROPPED = 13
"""Bits of the 23 after the leading one that TF32 does not have."""


class Rounded(TorchDispatchMode):
    """Within, matrix products see float32 inputs as TF32 has them."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.PRODUCTS:
            *added, a, b = args
            args = (*added, rounded(a), rounded(b))
        return func(*args, **(kwargs or {}))


def rounded(x: Tensor) -> Tensor:
    """The nearest TF32 numbers, ties away from zero, of finite float32 ones."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << (DROPPED - 1))) & -(1 << DROPPED)).view(torch.float32)


def main(args: Sequence[str]) -> int:
    """Compare, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(prog="hpcmlip bench tf32", description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", type=Path, metavar="RUN", help="run directory, or model.json, with its stores in place"
    )
    parser.add_argument("--batches", type=int, default=BATCHES)
    options = parser.parse_args(args)
    exact, card = load_model(options.model, torch.float64)
    config = from_values(RunConfig, card["config"], options.model, where=str(options.model))
    dataset = Dataset.open(config.data.stores, config.data.levels)
    single, _ = load_model(options.model)
    batches = split_batches(
        dataset, config.data, "val", cutoff=config.model.cutoff, rank=0, size=1, dtype=torch.float64
    )
    squares: dict[str, list[Tensor]] = {}
    for blocks in islice(batches, options.batches):
        narrow = [block.to(dtype=torch.float32) for block in blocks]
        expected = exact(blocks)
        for block, reference in zip(blocks, expected, strict=True):
            for prop, (error, mask) in batch_errors(block, reference).items():
                squares.setdefault(f"model {prop}", []).append(error[mask.expand_as(error)].square())
        for name, found in (("float32", single(narrow)), ("TF32", _in_tf32(single, narrow))):
            for a, b in zip(found, expected, strict=True):
                for prop in ("energy", "forces"):
                    difference = (getattr(a, prop) - getattr(b, prop)).square()
                    squares.setdefault(f"{name} {prop}", []).append(difference.flatten())
    result = {
        "benchmark": "TF32",
        "model": config.model.kind,
        "rmse": {name: float(torch.cat(values).mean().sqrt()) / KCAL_PER_MOL for name, values in squares.items()},
    }
    _show(result["rmse"])
    print(json.dumps(result))
    return 0


def _in_tf32(potential: Potential, blocks):
    with Rounded():
        return potential(blocks)


def _show(rmse: dict[str, float]) -> None:
    table = Table(title="RMSE to float64; of the model itself to its labels", title_justify="left")
    for column in ("", "energy, kcal/mol", "forces, kcal/mol/Å"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("model", "float32", "TF32"):
        table.add_row(name, *(f"{rmse[f'{name} {prop}']:.2g}" for prop in ("energy", "forces")))
    Console().print(table)
