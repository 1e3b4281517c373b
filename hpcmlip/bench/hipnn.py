"""Our HIP-NN-TS against hippynn's, with the same weights on the same molecules, in one run and interleaved.

What is timed: energies, forces and the backward pass of a squared error of both to all parameters, from positions on.
hippynn gets its list of pairs for nothing (built once, not timed); our neighbourhoods are part of the time.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from hpcmlip.bench import roofline
from hpcmlip.bench.hippynn_step import Hippynn, fastest
from hpcmlip.bench.stepping import (
    Step,
    data_spec,
    milliseconds,
    molecules,
    potential_step,
    ratio,
    take_turns,
    timer,
)
from hpcmlip.models.hipnn import Config
from hpcmlip.models.hippynn_state import load_hippynn_state
from hpcmlip.models.potential import Potential

COMPONENT = "energy + forces + backward of HIP-NN-TS, ours against hippynn"

SETTINGS = ("features", "lmax", "interactions", "atom_layers")


def main(args: Sequence[str]) -> int:
    """Check that both agree, time both, print a table and a line of JSON; 1 if they do not agree."""
    options = _parse(args)
    torch.set_num_threads(options.threads)
    peer = Hippynn(**{key: getattr(options, key) for key in SETTINGS}, device=options.device)
    numbers, pos = molecules(options.data, options.atoms, options.molecules)
    differences = _compare(peer, options, numbers, pos)
    worst = max(differences.values())
    # hippynn's numba kernels leave out sensitivities below 1e-10
    if not worst < 1e-6:
        print(f"the two do not agree in float64: relative differences {differences}")
        return 1
    trial = peer.trial(options.kernels or peer.kernels(), numbers, pos, options.trials)
    kernels = fastest(trial)
    steps = {"hippynn": peer.step(kernels, numbers, pos), "hpcmlip": _ours(peer, options, numbers, pos)}
    if options.compile:
        steps["hpcmlip, compiled"] = _ours(peer, options, numbers, pos, is_compiled=True)
    needed = roofline.products(steps["hpcmlip"].parts[0].net, pos.shape[0] * options.atoms, options.atoms)
    turns = {name: timer(step) for name, step in steps.items()} | roofline.timers(needed, options.device)
    seconds = take_turns(turns, options.repeats)
    result = _summary({name: seconds[name] for name in steps}, differences) | {
        "limit": roofline.account(needed, roofline.rest(steps["hpcmlip"]), seconds),
        "hippynn_kernels": kernels,
        "hippynn_kernels_milliseconds": {name: milliseconds(values) for name, values in trial.items()},
        "torch": torch.__version__,
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
    }
    _show(result)
    return 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hpcmlip bench hipnn", description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--lmax", type=int, choices=(0, 1, 2), default=2)
    parser.add_argument("--interactions", type=int, default=2)
    parser.add_argument("--atom-layers", type=int, default=3)
    parser.add_argument("--atoms", type=int, default=9, help="size of the molecules")
    parser.add_argument("--molecules", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--kernels", nargs="+", help="hippynn's, by its names; default: all there are, compiled ones too"
    )
    parser.add_argument("--compile", action="store_true", help="ours with engine.compile as well")
    parser.add_argument("--trials", type=int, default=2, help="steps with each of the kernels, to find the fastest")
    parser.add_argument("--data", type=Path, help="raw HDF5 file in the ANI-1x layout; default: the packaged sample")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(args)


def _ours(peer: Hippynn, options, numbers, pos, dtype=torch.float32, *, is_compiled: bool = False) -> Step:
    config = Config(**{key: getattr(options, key) for key in SETTINGS})
    potential = Potential(config, data_spec(), seed=0).to(options.device, dtype)
    load_hippynn_state(potential.net, peer.network.state_dict(), [peer.head.state_dict()])
    if is_compiled:
        potential.compile_forces()
    step = potential_step(potential, numbers, pos, options.device, dtype)
    step.parts = (potential,)
    return step


def _compare(peer: Hippynn, options, numbers, pos) -> dict[str, float]:
    """Largest difference of energies, forces and gradients in float64, relative to the largest value of each."""
    theirs = peer.step("_pytorch_raw", numbers, pos, torch.float64)
    ours = _ours(peer, options, numbers, pos, torch.float64)
    results = dict(zip(("energy", "forces"), zip(theirs(), ours(), strict=True), strict=True))
    network, head = theirs.parts
    potential = ours.parts[0]
    expected = copy.deepcopy(potential.net)
    extra = {name: value for name, value in network.state_dict().items() if name.endswith("_extra_state")}
    gradients = [
        {name: p.grad if p.requires_grad else p for name, p in part.named_parameters()} for part in (network, head)
    ]
    load_hippynn_state(expected, gradients[0] | extra, [gradients[1]])
    difference = {name: float((a - b).abs().max() / a.abs().max()) for name, (a, b) in results.items()}
    pairs = zip(potential.net.parameters(), expected.parameters(), strict=True)
    relative = [float((p.grad - e.detach()).norm() / e.detach().norm()) for p, e in pairs]
    return difference | {"gradients": max(relative)}


def _summary(seconds: dict[str, list[float]], differences: dict[str, float]) -> dict:
    return {
        "milliseconds": {name: milliseconds(values) for name, values in seconds.items()},
        "ratio": {name: ratio(seconds["hippynn"], own) for name, own in seconds.items() if name != "hippynn"},
        "relative_difference_float64": differences,
    }


def _show(result: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="HIP-NN-TS: energy + forces + backward", title_justify="left")
    for column in ("program", "median ms a step", "structures/s"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for name, median in result["milliseconds"].items():
        label = f"{name} ({result['hippynn_kernels']} kernels)" if name == "hippynn" else name
        table.add_row(label, f"{median:.1f}", f"{1e3 * result['molecules'] / median:.0f}")
    console = Console()
    console.print(table)
    limit = result["limit"]
    table = Table(title="What the step of hpcmlip is made of", title_justify="left")
    for column in ("part", "measured in this run", "ms"):
        table.add_column(column, justify="right" if column == "ms" else "left")
    for row in roofline.rows(limit):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"the step reaches {limit['bound_fraction']:.0%} of the limit; its products alone would take "
        f"{limit['products_fraction']:.0%} of its time"
    )
    for name, (times, (low, high)) in result["ratio"].items():
        console.print(f"{name}: {times} times as fast as hippynn (quartiles {low} to {high})")
    console.print(" ".join(f"{k}={result[k]}" for k in ("lmax", "features", "atoms", "molecules", "threads", "device")))
    print(json.dumps(result))
