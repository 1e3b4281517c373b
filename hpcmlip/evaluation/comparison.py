"""Two evaluations side by side: how much better one ensemble is than the other at one level of theory.

    python -m hpcmlip.evaluation.comparison FIRST SECOND --level cc

FIRST and SECOND are folders that `hpcmlip evaluate` wrote. Both must stand on the same split of the same store.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from hpcmlip.errors import ConfigError, DataError, UserError
from hpcmlip.plugins import suggest


@dataclass(frozen=True)
class Side:
    """One evaluation at the level and property that are compared."""

    folder: Path
    name: str
    trained: str
    """Levels and labels the ensemble was trained on, such as `dz EF + cc E`."""
    data: tuple[str, str]
    """Digest of the store, split."""
    members: int
    rmse: float
    """Mean over the members."""
    half_width: float | None
    """Of the 95 % t interval of that mean; None for one member."""
    ensemble_rmse: float
    """Of the mean prediction."""
    unit: str
    count: int


def read(folder: Path, level: str, prop: str) -> Side:
    """The figures of one level and property in `folder`/metrics.json; raises DataError or ConfigError."""
    path = folder / "metrics.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        levels = content["levels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read {path} ({error!r}); is {folder} a finished 'hpcmlip evaluate --out'?") from None
    if level not in levels:
        raise ConfigError(f"{path} has no level '{level}'{suggest(level, levels)}")
    if prop not in levels[level]:
        raise ConfigError(f"{path} has no {prop} of the level '{level}'{suggest(prop, levels[level])}")
    figures = levels[level][prop]
    trained = content.get("trained") or {}
    return Side(
        folder=folder,
        name=next((m["name"] for m in content["members"] if m.get("name")), folder.name),
        trained=" + ".join(f"{key} {value}" for key, value in trained.items()),
        data=(content["store"]["digest"], content["split"]["name"]),
        members=len(content["members"]),
        rmse=figures["rmse"],
        half_width=figures["ci95_rmse"],
        ensemble_rmse=content["ensemble"][level][prop]["rmse"],
        unit=figures["unit"],
        count=figures["count"],
    )


def compare(first: Side, second: Side, level: str, prop: str) -> str:
    """The comparison as text; raises ConfigError if the two do not stand on the same data in the same unit."""
    if first.data != second.data or first.count != second.count:
        raise ConfigError(
            f"{first.folder} and {second.folder} were evaluated on different structures "
            f"({first.count} and {second.count} labels, split {first.data[1]} and {second.data[1]}): "
            "evaluate both with the same --data and --split"
        )
    if first.unit != second.unit:
        raise ConfigError(
            f"{first.folder} is in {first.unit}, {second.folder} in {second.unit}: give both the same --units"
        )
    width = max(len(side.name) for side in (first, second))
    lines = [f"RMSE of the {level} {prop} on {first.count} labels of the {first.data[1]} split, {first.unit}:"]
    lines += [f"  {_line(side, width)}" for side in (first, second)]
    lines.append(
        f"  {second.name} against {first.name}: {first.rmse / second.rmse:.2f} times smaller a member, "
        f"{first.ensemble_rmse / second.ensemble_rmse:.2f} times smaller for the ensemble mean"
    )
    lines += [f"  report: {side.folder / 'report.html'}   plots: {side.folder / 'plots'}" for side in (first, second)]
    return "\n".join(lines)


def _line(side: Side, width: int) -> str:
    interval = "" if side.half_width is None else f" ± {side.half_width:.2f} (95 %)"
    trained = f"  trained on {side.trained}" if side.trained else ""
    return (
        f"{side.name:<{width}}  member {side.rmse:.2f}{interval}, mean of {side.members} members "
        f"{side.ensemble_rmse:.2f}{trained}"
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hpcmlip.evaluation.comparison", description=__doc__.split("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--level", required=True, help="level of theory")
    parser.add_argument("--property", default="energy", choices=("energy", "forces"))
    options = parser.parse_args(arguments)
    try:
        sides = [read(folder, options.level, options.property) for folder in (options.first, options.second)]
        print(compare(*sides, options.level, options.property))
    except UserError as error:
        print(f"hpcmlip: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
