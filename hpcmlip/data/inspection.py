"""What a store holds (`show`) and whether it is still whole (`verify`)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from hpcmlip.data import store as stores
from hpcmlip.data.offsets import atomic_energies, isolated_energies, knows_isolated
from hpcmlip.data.store import SPLITS, Meta, Store, energy_bit, forces_bit
from hpcmlip.units import SYMBOLS


def label_counts(meta: Meta) -> dict[str, dict[str, dict[str, int]]]:
    """level -> "energy" | "forces" -> split -> labelled structures."""
    counts = {
        level.name: {name: dict.fromkeys(SPLITS, 0) for name in ("energy", "forces")[: 1 + level.has_forces]}
        for level in meta.levels
    }
    for group in meta.groups:
        for segment in group.segments:
            for i, level in enumerate(meta.levels):
                for name, bit in (("energy", energy_bit(i)), ("forces", forces_bit(i))):
                    if segment.labels & bit:
                        counts[level.name][name][segment.split] += segment.stop - segment.start
    return counts


def split_counts(meta: Meta) -> dict[str, int]:
    """split -> structures."""
    counts = dict.fromkeys(SPLITS, 0)
    for group in meta.groups:
        for segment in group.segments:
            counts[segment.split] += segment.stop - segment.start
    return counts


def fitted(meta: Meta, level: int) -> tuple[np.ndarray, float]:
    """([E] eV, RMS residual eV): atomic energies that fit the totals of a level best on its training split."""
    rest, rms = atomic_energies(meta.offsets[level])
    return isolated_energies(meta.levels[level], meta.elements) + rest, rms


def level_table(meta: Meta) -> Table:
    """Per level: labels in each split, atomic energies fitted to the totals and what they leave."""
    table = Table(title="levels of theory", title_justify="left")
    table.add_column("level")
    table.add_column("labels")
    for split in SPLITS:
        table.add_column(split, justify="right")
    for z in meta.elements:
        table.add_column(f"{SYMBOLS[z]} / eV", justify="right")
    table.add_column("residual RMS / eV", justify="right")
    table.add_column("isolated atoms")
    for i, (name, labels) in enumerate(label_counts(meta).items()):
        energies, rms = fitted(meta, i)
        known = "known" if knows_isolated(meta.levels[i], meta.elements) else "unknown"
        for prop, counts in labels.items():
            row = [name, prop, *(f"{counts[split]:,}" for split in SPLITS)]
            fit = [f"{e:.3f}" for e in energies] + [f"{rms:.3f}", known]
            table.add_row(*row, *(fit if prop == "energy" else [""] * len(fit)))
    return table
