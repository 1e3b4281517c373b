"""learning.json and learning.md: what came of the runs of `hpcmlip bench learning`."""

import argparse
import json
import sys
from collections.abc import Sequence

from hpcmlip.files import write_atomic

COLUMNS = (("gfn2", "energy"), ("gfn2", "forces"), ("gfn1", "energy"), ("gfn1", "forces"))
UNITS = {"energy": "kcal/mol", "forces": "kcal/mol/Å"}
_HEADER = (
    *("model", "trained on", "parameters", "peak lr", "structures", "epochs", "steps", "CPU s"),
    *(f"{level} {prop}" for level, prop in COLUMNS),
)
_TRAINED = {"SF": "gfn2 E", "MF": "gfn1 EF, gfn2 E"}


def sentence(record: dict) -> str:
    """One finished run in words."""
    errors = ", ".join(
        f"{level} {prop} {value:.2f} {UNITS[prop]}" for (level, prop), value in _rmse(record["levels"]).items()
    )
    return f"test RMSE {errors} after {record['steps']} steps, {record['cpu_seconds']['train']} CPU s"


def write(options: argparse.Namespace, records: Sequence[dict | None]) -> None:
    """Write both files from the runs finished so far."""
    options.out.mkdir(parents=True, exist_ok=True)
    done = [record for record in records if record]
    content = {
        "command": "hpcmlip bench learning " + " ".join(_arguments(options)),
        "python": sys.version.split()[0],
        "versions": done[-1]["versions"] if done else {},
        "runs": done,
        "missing": len(records) - len(done),
    }
    write_atomic(options.out / "learning.json", json.dumps(content, indent=1))
    write_atomic(options.out / "learning.md", markdown(content))


def _arguments(options: argparse.Namespace) -> list[str]:
    """The options that matter for the figures, with the names of files only."""
    changes = ["--set", *options.set] if options.set else []
    return [
        *("--data", options.data.name, "--out", options.out.name, "--minutes", f"{options.minutes:g}"),
        *("--heavy-atoms", str(options.heavy_atoms), "--models", *options.models, *changes),
    ]


def markdown(content: dict) -> str:
    """The table, and what to know about it."""
    runs = content["runs"]
    lines = [_line(_HEADER), _line(["---", "---", *["---:"] * (len(_HEADER) - 2)])]
    if runs:
        # its levels are those of every run
        full = max(runs, key=lambda record: len(record["baseline"]))
        lines.append(_line(["composition alone", "", *[""] * 6, *_cells(full["baseline"])]))
    lines += [_row(record) for record in runs]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    text = [
        "# Test errors at the same CPU time",
        "",
        f"`{content['command']}` ({versions})",
        "",
        *lines,
        "",
        "RMSE on the test split (molecules that no run has seen): energies of a molecule in kcal/mol, force components "
        "in kcal/mol/Å. No run was shown gfn2 forces. Composition alone: least-squares atomic energies, zero forces.",
        "",
        "Each run has the same CPU time for its training steps on one thread; without forces (gfn2 E alone) steps are "
        "cheaper, so there are more of them. CPU s is that of the whole training command, with start-up and "
        "validations. Models, losses and optimizers are those of the presets; the rate follows one cycle over the run "
        "with its peak as given. Where the time is less than one pass over the training structures takes, fewer of "
        "them are used, spread evenly (column structures); the test split is the same for all.",
        "",
        *_worse(runs),
        *([f"{content['missing']} runs are missing."] if content["missing"] else []),
    ]
    return "\n".join(text) + "\n"


def _worse(runs: Sequence[dict]) -> list[str]:
    """The runs that do not beat the composition."""
    names = [
        f"{record['preset']} {record['experiment']} ({level} {prop})"
        for record in runs
        for (level, prop), value in _rmse(record["levels"]).items()
        if value >= _rmse(record["baseline"])[level, prop]
    ]
    return [f"Not better than the composition alone: {', '.join(names)}."] if names else []


def _rmse(levels: dict) -> dict[tuple[str, str], float]:
    return {(level, prop): levels[level][prop]["rmse"] for level, prop in COLUMNS if prop in levels.get(level, {})}


def _cells(levels: dict) -> list[str]:
    found = _rmse(levels)
    return [f"{found[column]:.2f}" if column in found else "" for column in COLUMNS]


def _row(record: dict) -> str:
    cpu = record["cpu_seconds"]["train"]
    return _line(
        [
            *(record["preset"], _TRAINED[record["experiment"]], f"{record['parameters']:,}", f"{record['lr']:g}"),
            *(f"{record['structures']:,}", record["epochs"], f"{record['steps']:,}"),
            "interrupted" if cpu is None else f"{cpu:.0f}",
            *_cells(record["levels"]),
        ]
    )


def _line(cells: Sequence) -> str:
    return f"| {' | '.join(map(str, cells))} |"
