"""The numbers behind each plot, and the CSV files they are saved in."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpcmlip.evaluation import predictions
from hpcmlip.training.errors import PROPERTIES
from hpcmlip.units import ENERGY_UNITS

MAX_POINTS = 50_000
"""Points of a parity plot; of more, an evenly spaced part is drawn."""


@dataclass(frozen=True)
class Points:
    """Labels of one level and property against the mean prediction, in the unit of the evaluation."""

    level: str
    reference: np.ndarray
    predicted: np.ndarray
    sd: np.ndarray
    """Over members; NaN for one."""
    total: int
    """Labels there are; `reference` holds at most `MAX_POINTS` of them."""


def parity(path: Path, prop: str, unit: str) -> list[Points]:
    """Points of every level that has labels; energies relative to the composition-only baseline."""
    groups = list(predictions.groups(path))
    if not groups:
        return []
    names = _attributes(path)["levels" if prop == "energy" else "force_levels"]
    found = []
    for i, level in enumerate(names):
        counts = [_count(group, prop, i) for _, group in groups]
        step = max(1, -(-sum(counts) // MAX_POINTS))
        parts = [_points(group, prop, i, step) for _, group in groups]
        values = np.concatenate(parts, axis=1) / ENERGY_UNITS[unit]
        if values.shape[1]:
            found.append(Points(level, *values, total=sum(counts)))
    return found


def _attributes(path: Path) -> dict:
    return json.loads((path / "zarr.json").read_text())["attributes"]


def _count(group, prop: str, level: int) -> int:
    labels = group["energy_label"][:, level] if prop == "energy" else group["forces_label"][:, :, level]
    return int(np.isfinite(labels).sum())


def _points(group, prop: str, level: int, step: int) -> np.ndarray:
    """[3, n] label, mean, sd in eV of every `step`-th label."""
    if prop == "energy":
        base = group["energy_baseline"][:, level]
        columns = [group[f"energy_{kind}"][:, level] for kind in ("label", "mean", "std")]
        columns = [columns[0] - base, columns[1] - base, columns[2]]
    else:
        columns = [group[f"forces_{kind}"][:, :, level].astype(np.float64).ravel() for kind in ("label", "mean", "std")]
    known = np.isfinite(columns[0])
    return np.stack([column[known][::step] for column in columns])


@dataclass(frozen=True)
class Curve:
    """One quantity of one member at its validations."""

    member: str
    level: str
    """Empty for the objective."""
    quantity: str
    """`objective`, `energy` or `forces` (RMSE)."""
    unit: str
    epoch: np.ndarray
    value: np.ndarray


def learning_curves(runs: Sequence[Path]) -> list[Curve]:
    """Validation objective and RMSE of each level from the members' metrics.jsonl; members without one are left out."""
    curves = []
    for run in runs:
        records = _validations(run / "metrics.jsonl")
        if not records:
            continue
        series: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for record in records:
            epoch = float(record["epoch"])
            series.setdefault(("", "objective", record.get("unit", "")), []).append((epoch, record["objective"]))
            for level, props in record.get("levels", {}).items():
                for prop in set(PROPERTIES) & set(props):
                    values = props[prop]
                    series.setdefault((level, prop, values["unit"]), []).append((epoch, values["rmse"]))
        for (level, quantity, unit), points in series.items():
            epoch, value = np.array(points, dtype=np.float64).T
            curves.append(Curve(run.name, level, quantity, unit, epoch, value))
    return curves


def _validations(path: Path) -> list[dict]:
    """Validation records in order of their steps; a step that was repeated after a restart counts once."""
    if not path.is_file():
        return []
    by_step = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # the last line of a killed run
        if record.get("kind") == "validation" and record.get("objective") is not None:
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def flat_rows(sections: dict, keys: Sequence[str]) -> list[tuple]:
    """Rows (level, property, keys...) of a section {level: {property: [{...}]}} of metrics.json."""
    return [
        (level, prop, *(row[key] for key in keys))
        for level, props in sections.items()
        for prop, rows in props.items()
        for row in rows
    ]


def save(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
