"""Runs the benchmarks and writes the page of their commands, outputs and figures.

The page holds what each command printed, so that it says nothing that was not measured. Results that are not run again
stay as they were, with the date and the versions they were measured with.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from hpcmlip.errors import RunError

COMPONENT = "all benchmarks in a row, and the page that shows what they printed"
WIDTH = "110"
PACKAGES = ("torch", "deepspeed", "zarr", "hippynn")


@dataclass(frozen=True)
class Section:
    """A benchmark of the page; DATA and MACE in its arguments stand for what the command line names."""

    name: str
    title: str
    text: str
    arguments: tuple[str, ...]


def _hipnn(lmax: int, features: int) -> tuple[str, ...]:
    same = ("--threads", "2", "--atoms", "14", "--data", "DATA", "--kernels", "numba", "--compile")
    return ("hipnn", "--lmax", str(lmax), "--features", str(features), *same)


SECTIONS = (
    Section(
        "ani1",
        "Sharding: 22 million conformations",
        "Eight files of ANI-1's layout, with as many molecules and conformations as ANI-1 has; every row is read twice "
        "(to judge it, to write it). Memory is the sum over all processes.",
        ("ani1",),
    ),
    Section(
        "ani1_scaling",
        "Sharding: one and two workers, and beyond",
        "A tenth of the conformations of the same 57,462 molecules, so that what a molecule costs weighs ten times as "
        "much. The model has two constants, from these two runs: a part that does not shrink with workers and one that "
        "does. Beyond two workers it is an extrapolation, and holds as long as the file system serves what the last "
        "columns ask of it.",
        ("ani1", "--fraction", "0.1", "--workers", "1", "2"),
    ),
    Section(
        "shard",
        "Sharding: beside MACE",
        "MACE prepares energies and forces of one level; so does hpcmlip in the last column, in the others two levels. "
        "MACE gets every tenth conformation of the same molecules; its time is proportional to their number.",
        (
            *("shard", "configs/data/xtb_nms.yaml", "--data", "DATA", "--workers", "2", "1"),
            *("--copies", "10", "--repeats", "3", "--mace", "MACE"),
        ),
    ),
    Section(
        "shard_small",
        "Sharding: the same molecules once",
        "A small file, of which starting Python and the workers takes a large part.",
        ("shard", "configs/data/xtb_nms.yaml", "--data", "DATA", "--workers", "2", "1", "--repeats", "5"),
    ),
    Section(
        "loader",
        "Loader",
        "One core, every turn from an empty cache. MACE's loader makes its neighbour lists at this point; ours takes "
        "all pairs of small molecules, in the network.",
        ("loader", "--data", "DATA", "--mace", "MACE"),
    ),
    Section(
        "hipnn",
        "HIP-NN-TS: l = 2, 128 features",
        "Against hippynn with the fastest of its kernels for a CPU, with the same weights and the same results. "
        "Compiled: with `engine.compile`. The account is of the step that is not compiled.",
        _hipnn(2, 128),
    ),
    *(
        Section(f"hipnn_l{lmax}_f{F}", f"HIP-NN-TS: l = {lmax}, {F} features", "", _hipnn(lmax, F))
        for lmax, F in ((2, 64), (1, 128), (1, 64), (0, 128), (0, 64))
    ),
    Section(
        "compile",
        "Models, compiled or not",
        "What `engine.compile` does for the presets.",
        (
            *("models", "hipnn", "egnn", "deeppot", "neuralil", "--compile"),
            *("--atoms", "14", "--threads", "2", "--data", "DATA", "--kernels", "numba"),
        ),
    ),
    Section(
        "step",
        "The whole training step",
        "DeepSpeed engine, reduction, checks, average and logging against plain torch, and two processes against one.",
        ("step",),
    ),
    Section("startup", "Start-up", "", ("startup",)),
    Section(
        "forecast",
        "Forecast of time and memory",
        "`hpcmlip train --forecast` against the run that it foretells.",
        ("forecast", "configs/demo_mf.yaml", "train.epochs=30"),
    ),
)


def main(args: Sequence[str]) -> int:
    """Run benchmarks and write FOLDER/benchmarks.md and FOLDER/results/benchmarks.json."""
    parser = argparse.ArgumentParser(prog="hpcmlip bench page", description=__doc__.splitlines()[0])
    names = [section.name for section in SECTIONS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"these alone, of {', '.join(names)}")
    parser.add_argument("--data", type=Path, required=True, help="raw file of data/xtb_nms.yaml")
    parser.add_argument("--mace", type=Path, required=True, metavar="PYTHON", help="a Python that has mace-torch")
    parser.add_argument("--docs", type=Path, default=Path("docs"), metavar="FOLDER")
    options = parser.parse_args(args)
    if unknown := sorted(set(options.names) - set(names)):
        parser.error(f"no benchmark {', '.join(unknown)}")
    record = options.docs / "results" / "benchmarks.json"
    results = json.loads(record.read_text()) if record.is_file() else {}
    failed = []
    for section in SECTIONS:
        if options.names and section.name not in options.names:
            continue
        try:
            results[section.name] = _run(section, options)
        except RunError as error:
            failed.append(section.name)
            print(error)
            continue
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(results, indent=1) + "\n")
        (options.docs / "benchmarks.md").write_text(render(results))
    return int(bool(failed))


def _run(section: Section, options) -> dict:
    """Run one; its output is shown and kept. Raises RunError if it fails."""
    paths = {"DATA": options.data, "MACE": options.mace}
    command = [sys.executable, "-m", "hpcmlip", "bench", *(str(paths.get(word, word)) for word in section.arguments)]
    print(f"$ {_shown(section)}", flush=True)
    environment = os.environ | {"COLUMNS": WIDTH}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    print(done.stdout, flush=True)
    if done.returncode:
        raise RunError(f"{section.name} failed with exit code {done.returncode}")
    # where the files lie here is nobody else's business
    printed = done.stdout.replace(str(options.data), options.data.name).replace(str(options.mace), "PYTHON")
    *text, last = printed.rstrip().splitlines()
    return {
        "command": _shown(section),
        "output": "\n".join(line.rstrip() for line in text),
        "result": json.loads(last),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": f"{len(os.sched_getaffinity(0))} cores, {_processor()}, Python {platform.python_version()}",
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def _shown(section: Section) -> str:
    """The command as a user would type it."""
    names = {"DATA": "xtb_nms.h5", "MACE": "PYTHON"}
    return shlex.join(["hpcmlip", "bench", *(names.get(word, word) for word in section.arguments)])


def _processor() -> str:
    with open("/proc/cpuinfo") as file:
        found = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return found[0] if found else platform.machine()


def render(results: dict[str, dict]) -> str:
    """The page of results by name of section."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `make bench` (`hpcmlip bench page`), which runs the commands below and copies what they print.",
        "Peers run in the same command, in turns with ours; times are medians. CPU figures are to be read as ratios:",
        "the machine is a small virtual one. GPU figures: none was at hand, nothing here was measured on one.",
    ]
    for section in SECTIONS:
        if section.name not in results:
            continue
        found = results[section.name]
        versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
        lines += ["", f"## {section.title}", "", *([section.text, ""] if section.text else [])]
        lines += [f"`{found['command']}`", "", "```", found["output"], "```", ""]
        lines += [f"{found['date']}; {found['machine']}; {versions}."]
    return "\n".join(lines) + "\n"
