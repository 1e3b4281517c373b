"""Stores of the small molecules of a raw file in the ANI-1x layout."""

import os
from pathlib import Path

import h5py

from hpcmlip import configs
from hpcmlip.bench.commands import Commands

CONFIG = "data/xtb_nms.yaml"


def make_store(raw: Path, work: Path, heavy_atoms: int, every: int, commands: Commands) -> Path:
    """Store below `work` of every `every`-th conformation of the molecules with at most so many heavy atoms.

    Molecules are split by a hash of their own: what is test data in one of these stores is so in all of them.
    """
    store = work / f"heavy{heavy_atoms}{f'-every{every}' if every > 1 else ''}.zarr"
    if not store.exists():
        part = store.with_suffix(".h5")
        if not part.exists():
            _select(raw, part, heavy_atoms, every)
        overrides = (f"sources=['{part}']", f"out={store}")
        commands.run("shard", configs.path(CONFIG), *overrides, "--workers", 1, log=store.with_suffix(".txt"))
    return store


def _select(raw: Path, part: Path, heavy_atoms: int, every: int) -> None:
    """Write `part`: the wanted groups of `raw` with every `every`-th conformation."""
    partial = part.with_suffix(f".{os.getpid()}.partial")  # two commands may share the folder
    with h5py.File(raw) as source, h5py.File(partial, "w") as target:
        for name, group in source.items():
            if (group["atomic_numbers"][:] > 1).sum() <= heavy_atoms:
                for key, dataset in group.items():
                    rows = slice(None) if key == "atomic_numbers" else slice(None, None, every)
                    target.create_dataset(f"{name}/{key}", data=dataset[rows], dtype=dataset.dtype)
    partial.rename(part)
