"""The whole training step against plain torch, on one and on two processes of a core each, and its time on N of them.

Ours is the step of `hpcmlip train` (`step_rank.py`): data, engine, checks on all ranks, reduction, clipping, update,
average, metrics. Plain torch does forward, loss, backward, clipping and update on the same batches. Both and both
numbers of processes take turns in one run. Work is the same for each process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from hpcmlip import configs
from hpcmlip.bench import step_rank
from hpcmlip.bench.commands import Commands
from hpcmlip.bench.stepping import milliseconds, take_turns
from hpcmlip.config import RunConfig, load
from hpcmlip.errors import RunError

COMPONENT = "a whole training step against plain torch; one and two processes, and what N would take"

TOLERANCE = 1e-4
"""Of weights after the steps of the check, relative to the norm of each tensor; Adam follows the rounding of gradients
that are 0."""
CHECKED_STEPS = 5
LEVELS = {"gfn1": "EF", "gfn2": "E"}
DATA = "data/xtb_tiny.yaml"
COUNTS = (2, 8, 64, 512)
SHARE = 0.1
"""Of a step, that communication may take where a batch counts as large enough."""


def main(args: Sequence[str]) -> int:
    """Check that the weights agree, time, print tables and a line of JSON; 1 if they do not agree."""
    options = _parse(args)
    with tempfile.TemporaryDirectory(prefix="hpcmlip-bench-") as folder:
        work = Path(folder)
        store = options.store or _make_store(work)
        jobs = {ranks: Job(ranks, _config(options, store, ranks, work), work) for ranks in (1, 2)}
        try:
            differences = {ranks: job.check() for ranks, job in jobs.items()}
            if max(differences.values()) > TOLERANCE:
                print(f"weights differ from plain torch's after {CHECKED_STEPS} steps: {differences}")
                return 1
            take_turns({str(ranks): job.step for ranks, job in jobs.items()}, options.repeats)
            reduction = jobs[2].reduction()
        finally:
            for job in jobs.values():
                job.close()
        stage = load(RunConfig, work / "run2.yaml").engine.zero_stage
    result = {
        "steps": {ranks: _summary(job) for ranks, job in jobs.items()},
        "differences": differences,
        "weak_scaling": _scaling(jobs),
        "all_reduce": reduction,
        "model": _model(jobs, reduction, stage, options),
        **{key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
    }
    _show(result)
    return 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="hpcmlip bench step", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="hipnn", help="file in configs/models/")
    parser.add_argument("--store", type=Path, help="with levels gfn1 and gfn2; default: made of the packaged sample")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a process in a step")
    parser.add_argument("--bandwidth", type=float, default=25.0, help="GB/s of a process in the network assumed for N")
    parser.add_argument("--latency", type=float, default=5.0, help="µs of a message there")
    parser.add_argument("--speedup", type=float, default=50.0, help="of an assumed device over one core")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="such as data.pairs_per_batch=20000")
    return parser.parse_args(args)


def _make_store(work: Path) -> Path:
    store = work / "store.zarr"
    commands = Commands()
    commands.run("shard", configs.path(DATA), f"out={store}", "--workers", 1, log=work / "shard.txt")
    return store


def _config(options: argparse.Namespace, store: Path, ranks: int, work: Path) -> Path:
    """RUN.yaml of the preset: on this store, the same work for each process, a learning rate that stays."""
    values = yaml.safe_load(configs.path(f"models/{options.preset}.yaml").read_text())
    values["data"] |= {"stores": [str(store.absolute())], "levels": LEVELS}
    values["loss"].pop("weights", None)
    values["optim"]["schedule"] = {"kind": "constant"}
    values["train"]["micro_batches_per_step"] = ranks * options.accumulate
    values["engine"] = values.get("engine", {}) | {"device": "cpu"}
    path = work / f"run{ranks}.yaml"
    path.write_text(yaml.safe_dump(values))
    config = load(RunConfig, path, options.overrides)
    path.write_text(yaml.safe_dump(json.loads(config.model_dump_json(exclude_unset=True))))
    return path


class Job:
    """A run of so many processes that takes its steps when asked; `said` are the answers that count."""

    def __init__(self, ranks: int, config: Path, work: Path):
        self.ranks, self.said = ranks, []
        self._log = work / f"rank{ranks}.txt"
        launcher = [Path(sys.executable).with_name("mpirun"), "--oversubscribe", "--bind-to", "none", "-n", ranks]
        rank = [sys.executable, "-m", step_rank.__name__, config, work / f"run{ranks}"]
        # a machine of one's own: as root in a container, too
        env = {"OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                list(map(str, [*launcher, *rank] if ranks > 1 else rank)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | env,
            )
        self.hello = self._answer()

    def check(self) -> float:
        """Largest relative difference of a weight tensor to plain torch's after the first steps."""
        for _ in range(CHECKED_STEPS):
            self.step()
        difference = self.said[-1]["difference"]
        self.said.clear()
        return difference

    def step(self) -> float:
        """Seconds of our step."""
        self._say(step_rank.STEP)
        self.said.append(self._answer())
        return self.seconds("hpcmlip")[-1]

    def seconds(self, part: str) -> list[float]:
        """Of a part of each step."""
        return [said["seconds"].get(part, 0.0) for said in self.said]

    def reduction(self) -> dict[str, float]:
        """Seconds of an all-reduce by bytes."""
        self._say(step_rank.REDUCE)
        return dict(zip(map(str, step_rank.REDUCE_BYTES), self._answer()["seconds"], strict=True))

    def close(self) -> None:
        """End its processes."""
        if self._process.poll() is None:
            self._say(step_rank.END)
        self._process.wait()

    def _say(self, line: str) -> None:
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{self.ranks} process(es) gave no answer: {self._log.read_text()[-2000:]}")
        return json.loads(line)


# ----------------------------------------------------------------------------------------------------- what was seen


def _summary(job: Job) -> dict:
    ours, plain = job.seconds("hpcmlip"), job.seconds("plain")
    rates = [said["structures"] / s for said, s in zip(job.said, ours, strict=True)]
    return {
        "milliseconds": {"hpcmlip": milliseconds(ours), "plain": milliseconds(plain)},
        "structures": statistics.median(said["structures"] for said in job.said),
        "structures_per_s": round(statistics.median(rates), 1),
        "overhead_percent": quartiles(_overheads(ours, plain)),
        "overhead_percent_cpu": quartiles(_overheads(job.seconds("hpcmlip cpu"), job.seconds("plain cpu"))),
        "percent_of_plain": {part: quartiles(values) for part, values in _parts(job).items()},
        "parameters": job.hello["parameters"],
        "threads": job.hello["threads"],
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """[median, lower, upper quartile]."""
    return [round(float(x), 2) for x in np.quantile(values, (0.5, 0.25, 0.75))]


def _overheads(ours: Sequence[float], plain: Sequence[float]) -> list[float]:
    return [100 * (a / b - 1) for a, b in zip(ours, plain, strict=True)]


def _parts(job: Job) -> dict[str, list[float]]:
    """What each part of a step takes longer than in plain torch, in percent of plain torch's whole step."""
    seconds = {name: np.array(job.seconds(name)) for name in ("hpcmlip", "engine", *job.said[0]["seconds"])}
    own = {part: seconds[part] for part in ("forward", "backward", "update")}
    own["agreement"] = seconds["engine"] - sum(own.values())
    longer = {part: own[part] - seconds[f"plain {part}"] for part in step_rank.PARTS}
    longer |= {part: seconds[part] for part in ("average", "reports", "data")}
    longer["the rest"] = seconds["hpcmlip"] - sum(seconds[part] for part in ("engine", "average", "reports", "data"))
    return {part: (100 * values / seconds["plain"]).tolist() for part, values in longer.items()}


def _scaling(jobs: dict[int, Job]) -> dict[str, list[float]]:
    """How many times the pairs or structures a second of one process two have, turn by turn."""

    def rates(job: Job, what: str) -> np.ndarray:
        return np.array([said[what] for said in job.said]) / job.seconds("hpcmlip")

    return {what: quartiles(rates(jobs[2], what) / rates(jobs[1], what)) for what in ("structures", "pairs")}


# ------------------------------------------------------------------------------------------- a step on N processes


@dataclass(frozen=True)
class Network:
    """α + bytes / β: a message between two processes."""

    latency: float
    """s."""
    bandwidth: float
    """bytes/s."""

    @staticmethod
    def fit(all_reduce: dict[str, float]) -> "Network":
        """From all-reduces (bytes -> s) between two processes, which take 2 messages of half the bytes."""
        sizes = sorted(all_reduce, key=int)
        small, large = all_reduce[sizes[0]], all_reduce[sizes[-1]]
        return Network(small / 2, int(sizes[-1]) / max(large - small, 1e-9))

    def step(self, processes: int, size: int, stage: int) -> float:
        """Seconds of the communication in a step with `size` bytes of gradients.

        Rings (Patarasuk and Yuan 2009): an all-reduce takes 2 (N - 1) messages of 1/N of the bytes, an all-gather half
        of them. ZeRO 1 and 2 reduce the sums, the gradients and their norm and gather the weights; stage 0 has no
        gather.
        """
        rounds = 2 if stage == 0 else 3
        messages = (2 * 3 + (stage > 0)) * (processes - 1)
        return messages * self.latency + rounds * (processes - 1) / processes * size / self.bandwidth


def slowest(work: Sequence[float], processes: int) -> float:
    """Expected largest of so many draws from `work`, in units of its mean: all wait for the process with most."""
    ordered = np.sort(np.asarray(work, dtype=float))
    below = np.arange(len(ordered) + 1) / len(ordered)
    return float((ordered * np.diff(below**processes)).sum() / ordered.mean())


def _model(jobs: dict[int, Job], all_reduce: dict[str, float], stage: int, options: argparse.Namespace) -> dict:
    """t(N) = compute · slowest(N) + constant + communication(N), from the steps of one process.

    An assumed device shortens the constant part as well, which rather overstates the part of the network.
    """
    alone = jobs[1]
    whole = statistics.median(alone.seconds("hpcmlip"))
    compute = min(whole, sum(statistics.median(alone.seconds(part)) for part in ("forward", "backward")))
    size, pairs = 4 * alone.hello["parameters"], statistics.median(said["pairs"] for said in alone.said)
    seen = Network.fit(all_reduce)
    assumed = Network(1e-6 * options.latency, 1e9 * options.bandwidth)
    cases = {
        "core, here": (compute, whole - compute, seen),
        "core, network": (compute, whole - compute, assumed),
        "device, network": (compute / options.speedup, (whole - compute) / options.speedup, assumed),
    }
    work = alone.hello["epoch_pairs"]
    rows = []
    for case, (compute_, constant, network) in cases.items():
        for processes in COUNTS:
            communication = network.step(processes, size, stage)
            waiting = compute_ * (slowest(work, processes) - 1)
            step = compute_ + waiting + constant + communication
            rows.append(
                {
                    "case": case,
                    "processes": processes,
                    "milliseconds": 1e3 * step,
                    "communication_percent": 100 * communication / step,
                    "times_one_process": processes * (compute_ + constant) / step,
                    "pairs_for_share": round(pairs * communication * (1 / SHARE - 1) / compute_),
                }
            )
    return {
        "compute_milliseconds": 1e3 * compute,
        "constant_milliseconds": 1e3 * (whole - compute),
        "gradient_bytes": size,
        "pairs": pairs,
        "zero_stage": stage,
        "latency_microseconds": 1e6 * seen.latency,
        "bandwidth_gb_per_s": 1e-9 * seen.bandwidth,
        "seen_milliseconds_2": milliseconds(jobs[2].seconds("hpcmlip")),
        "steps": rows,
    }


# ---------------------------------------------------------------------------------------------------------- in words


def _show(result: dict) -> None:
    console = Console()
    table = Table(title=f"A training step of {result['preset']}, a core a process", title_justify="left")
    for column in ("ranks", "ms", "plain", "per s", "overhead %", "of CPU time %"):
        table.add_column(column, justify="right")
    for ranks, seen in result["steps"].items():
        times = (f"{seen['milliseconds'][program]:.1f}" for program in ("hpcmlip", "plain"))
        overheads = (_spread(seen[key]) for key in ("overhead_percent", "overhead_percent_cpu"))
        table.add_row(str(ranks), *times, f"{seen['structures_per_s']:.0f}", *overheads)
    console.print(table)
    table = Table(title="longer than in plain torch, in % of its whole step", title_justify="left")
    table.add_column("")
    for ranks in result["steps"]:
        table.add_column(f"{ranks} process(es)", justify="right")
    columns = [seen["percent_of_plain"] for seen in result["steps"].values()]
    for part in columns[0]:
        table.add_row(part, *(_spread(column[part]) for column in columns))
    console.print(table)
    scaling = {what: _spread(values) for what, values in result["weak_scaling"].items()}
    console.print(
        f"two processes do {scaling['structures']} times the structures/s of one ({scaling['pairs']} by pairs)"
    )
    _show_model(console, result)
    print(json.dumps(result))


def _show_model(console: Console, result: dict) -> None:
    model = result["model"]
    table = Table(title=f"a step on N processes with {model['pairs']:.0f} pairs each", title_justify="left")
    for column in ("", "N", "ms", "network %", "times one", f"pairs for {SHARE:.0%}"):
        table.add_column(column, justify="left" if not column else "right")
    for row in model["steps"]:
        figures = (
            f"{row['milliseconds']:.1f}",
            f"{row['communication_percent']:.1f}",
            f"{row['times_one_process']:.1f}",
        )
        table.add_row(row["case"], str(row["processes"]), *figures, f"{row['pairs_for_share']:,}")
    console.print(table)
    latency, bandwidth = model["latency_microseconds"], model["bandwidth_gb_per_s"]
    text = f"""seen with 2: {model["seen_milliseconds_2"]} ms
here: a message takes {latency:.0f} µs and {bandwidth:.2f} GB/s
assumed: {result["latency"]:g} µs, {result["bandwidth"]:g} GB/s, a device {result["speedup"]:g} times as fast as a core
beyond 2 processes all is extrapolated: no other traffic, no noise of the machines, data always ready"""
    console.print(text, highlight=False)


def _spread(values: Sequence[float]) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*values)
