"""Speed and memory of a training step of every model, beside hippynn and other programs, interleaved in one run.

The models are those of the presets, as large as there. A step is energies, forces and the backward pass of a squared
error of both to all parameters, from positions on, in float32. A program that is too slow for all molecules gets fewer.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hpcmlip import configs, plugins
from hpcmlip.bench.hippynn_step import Hippynn, fastest
from hpcmlip.bench.own_process import FEW, OwnProcess
from hpcmlip.bench.peer_process import PeerProcess
from hpcmlip.bench.stepping import (
    Step,
    data_spec,
    milliseconds,
    molecules,
    potential_step,
    ratio,
    take_turns,
)
from hpcmlip.config import RunConfig, load
from hpcmlip.models.potential import Potential

COMPONENT = "energy + forces + backward of every model: structures/s, memory, beside hippynn and other programs"

REFERENCE, COMPILED = "hippynn", "{}, compiled"
HIPPYNN = {"features": 128, "lmax": 2, "interactions": 2, "atom_layers": 3}
"""As the preset hipnn."""
LONGEST = 5.0
"""Seconds that a step may take; else it gets fewer molecules."""
COLUMNS = {
    "parameters": "weights",
    "molecules": "molecules",
    "milliseconds": "ms a step",
    "structures_per_s": "structures/s",
    "times_hippynn": "× hippynn",
    "mb_per_structure": "MB each",
}
PEERS = {
    "egnn": (
        "egnn-pytorch",
        "complete graph without cutoff, squared distances as they are (no Fourier features), no LayerNorm in the MLPs",
    ),
    "se3_transformer": (
        "se3-transformer-pytorch",
        "radial networks of full rank for every pair of channels (ours of low rank), hence more parameters",
    ),
    "deeppot": (
        "deepmd-kit",
        "its PyTorch backend, an embedding for each pair of elements, neighbours in slots; same cutoff and widths",
    ),
    "ani": ("torchani", "ANI-1x descriptor and networks in its Python form, without compiled extensions"),
}
"""Preset -> (program with the nearest architecture, how that one differs)."""


@dataclass
class Program:
    """One row of the table."""

    process: OwnProcess | PeerProcess
    parameters: int
    note: str = ""
    count: int = 0
    """Molecules of its step."""

    @property
    def name(self) -> str:
        return self.process.name


def main(args: Sequence[str]) -> int:
    """Time all, print a table and a line of JSON."""
    options = _parse(args)
    torch.set_num_threads(options.threads)
    numbers, pos = molecules(options.data, options.atoms, options.molecules)
    hippynn = Hippynn(**HIPPYNN, device=options.device)
    trial = hippynn.trial(options.kernels or hippynn.kernels(), numbers, pos, options.trials)
    programs: list[Program] = []
    try:
        programs.append(_hippynn(hippynn, fastest(trial), numbers, pos, options))
        for preset in options.models:
            programs.append(_ours(preset, numbers, pos, options))
            if options.compile and not _potential(preset).config.not_compiled:
                programs.append(_ours(preset, numbers, pos, options, is_compiled=True))
            if options.peers and preset in PEERS:
                programs.append(_peer(*PEERS[preset], numbers, pos, options))
        for program in programs:
            program.process.step(FEW)  # none is made ready beside another that is timed
        for program in programs:
            program.count = _affordable(program, options.molecules)
        timers = {program.name: partial(program.process.step, program.count) for program in programs}
        seconds = take_turns(timers, options.repeats)
        rows = [_row(program, seconds, programs[0].count) for program in programs]
    finally:
        for program in programs:
            program.process.close()
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"rows": rows, "hippynn_kernels": fastest(trial), "torch": torch.__version__, **settings}
    result["comparisons"] = _comparisons(options.models, programs, seconds)
    _show(result)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1))
    return 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    presets = sorted(Path(name).stem for name in configs.listing() if name.startswith("models/"))
    parser = argparse.ArgumentParser(prog="hpcmlip bench models", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="presets; default: that of each kind")
    parser.add_argument("--atoms", type=int, default=9, help="size of the molecules")
    parser.add_argument("--molecules", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kernels", nargs="+", help="hippynn's, by its names; default: all there are")
    parser.add_argument("--trials", type=int, default=2, help="steps with each of the kernels, to find the fastest")
    parser.add_argument("--data", type=Path, help="raw HDF5 file in the ANI-1x layout; default: the packaged sample")
    parser.add_argument("--compile", action="store_true", help="each model with engine.compile as well")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="Python with egnn-pytorch, torchani, ...")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the line of JSON goes too")
    options = parser.parse_args(args)
    unknown = sorted(set(options.models) - set(presets))
    if unknown:
        parser.error(f"no preset {', '.join(unknown)}; there are {', '.join(presets)}")
    options.models = options.models or sorted(set(presets) & set(plugins.names("models")))
    return options


# ---------------------------------------------------------------------------------------------------------- programs


def _hippynn(hippynn: Hippynn, kernels: str, numbers, pos, options) -> Program:
    parts = (hippynn.network, hippynn.head)
    return Program(
        OwnProcess(REFERENCE, _hippynn_step, kernels, numbers, pos, options.threads, options.device),
        sum(p.numel() for part in parts for p in part.parameters() if p.requires_grad),
        f"{kernels} kernels",
    )


def _ours(preset: str, numbers, pos, options, *, is_compiled: bool = False) -> Program:
    name, step = (COMPILED.format(preset), _our_compiled_step) if is_compiled else (preset, _our_step)
    parameters = sum(p.numel() for p in _potential(preset).parameters() if p.requires_grad)
    return Program(OwnProcess(name, step, preset, numbers, pos, options.threads, options.device), parameters)


def _peer(name: str, note: str, numbers, pos, options) -> Program:
    process = PeerProcess(options.peers, name, numbers, pos, options.threads, options.device)
    return Program(process, process.parameters, f"{process.version}: {note}")


def _potential(preset: str) -> Potential:
    config = load(RunConfig, configs.path(f"models/{preset}.yaml"))
    return Potential(config.model, data_spec(), seed=0)


def _our_step(preset: str, device: str) -> Callable[..., Step]:
    return partial(potential_step, _potential(preset), device=device)


def _our_compiled_step(preset: str, device: str) -> Callable[..., Step]:
    potential = _potential(preset).to(device)
    potential.compile_forces()
    return partial(potential_step, potential, device=device)


def _hippynn_step(kernels: str, device: str) -> Callable[..., Step]:
    return partial(Hippynn(**HIPPYNN, device=device).step, kernels)


# ------------------------------------------------------------------------------------------------------ measurements


def _affordable(program: Program, wanted: int) -> int:
    """Molecules that a step can have; doubled from a few on, since small steps tell little of large ones."""
    count = min(FEW, wanted)
    while count < wanted:
        more = min(2 * count, wanted)
        if program.process.step(count) * more / count > LONGEST:
            break
        count = more
    return count


def _row(program: Program, seconds: dict[str, list[float]], reference_count: int) -> dict:
    own = [value / program.count for value in seconds[program.name]]
    median, quartiles = ratio([value / reference_count for value in seconds[REFERENCE]], own)
    return {
        "program": program.name,
        "parameters": program.parameters,
        "molecules": program.count,
        "milliseconds": milliseconds(seconds[program.name]),
        "structures_per_s": round(1e3 / milliseconds(own), 1),
        "times_hippynn": median,
        "times_hippynn_quartiles": quartiles,
        "mb_per_structure": round(program.process.bytes / program.count / 1e6, 2),
        "note": program.note,
    }


def _comparisons(presets: Sequence[str], programs: Sequence[Program], seconds: dict) -> list[dict]:
    """How many times as many structures/s a preset does as its peer, and compiled as not: median and quartiles."""
    own = {p.name: [s / p.count for s in seconds[p.name]] for p in programs}
    pairs = [(preset, PEERS[preset][0]) for preset in presets if preset in PEERS]
    pairs += [(COMPILED.format(preset), preset) for preset in presets]
    found = []
    for name, other in pairs:
        if name in own and other in own:
            median, quartiles = ratio(own[other], own[name])
            found.append({"program": name, "beside": other, "times": median, "quartiles": quartiles})
    return found


def _show(result: dict) -> None:
    table = Table(title="Training step: energy + forces + backward, float32", title_justify="left")
    table.add_column("program")
    for header in COLUMNS.values():
        table.add_column(header, justify="right")
    for row in result["rows"]:
        table.add_row(row["program"], *(f"{row[key]:,}" for key in COLUMNS))
    console = Console()
    console.print(table)
    for row in result["rows"]:
        if row["note"]:
            console.print(f"{row['program']}: {row['note']}", markup=False)
    for found in result["comparisons"]:
        low, high = found["quartiles"]
        console.print(
            "{program} is {times} times as fast as {beside}".format(**found) + f" (quartiles {low} to {high})"
        )
    settings = " ".join(f"{key}={result[key]}" for key in ("atoms", "threads", "device", "repeats", "torch"))
    console.print(f"{settings}; memory is the growth by a step beyond the model itself")
    print(json.dumps(result))
