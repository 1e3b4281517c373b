"""Every model after the same small CPU time, trained on energies of one level and on two levels together.

GFN2-xTB is the level that matters, GFN1-xTB the cheap one. SF (single-fidelity) trains on GFN2 energies, MF
(multi-fidelity) on GFN1 energies and forces and GFN2 energies; both are judged by energies and forces of the test
split. GFN2 forces are shown to neither. Each run is `hpcmlip train` and `hpcmlip evaluate` on one thread. Finished runs
are kept in the work folder: after any interruption the same command goes on where it was.
"""

import argparse
import json
import shutil
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import yaml
from rich.console import Console

from hpcmlip import configs, plugins
from hpcmlip.bench import learning_table
from hpcmlip.bench.commands import Commands
from hpcmlip.bench.small_stores import make_store
from hpcmlip.config import LevelWeights, RunConfig, from_values, load
from hpcmlip.data.dataset import Dataset
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.files import write_atomic
from hpcmlip.launch import World
from hpcmlip.models.potential import Potential
from hpcmlip.training import setup

COMPONENT = "test errors of every model after the same CPU time, single- and multi-fidelity"

LOW, HIGH = "gfn1", "gfn2"
EXPERIMENTS = {"SF": {HIGH: "E"}, "MF": {LOW: "EF", HIGH: "E"}}
CALIBRATION_SECONDS = 20.0
VALIDATIONS = 4
_SHARDING = threading.Lock()


def main(args: Sequence[str]) -> int:
    """Run what is missing, write learning.json and learning.md; 1 if a run failed."""
    options = _parse(args)
    options.work.mkdir(parents=True, exist_ok=True)
    jobs = [_Job(name, experiment, options) for name in options.models for experiment in EXPERIMENTS]
    failed, console = [], Console()
    commands = Commands()
    # a batch system's way to end this; what runs then leaves a checkpoint
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(job.run, commands): job for job in jobs}
        try:
            for future in as_completed(futures):
                job, error = futures[future], future.exception()
                if isinstance(error, RunError):
                    failed.append(job.name)
                    console.print(f"{job.name} failed: {error}", markup=False)
                elif error is not None:
                    raise error
                else:
                    console.print(f"{job.name}: {learning_table.sentence(future.result())}", markup=False)
                learning_table.write(options, [job.record() for job in jobs])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            commands.end()
            raise
    console.print((options.out / "learning.md").read_text(encoding="utf-8"), markup=False)
    if failed:
        advice = f"start the command again to go on with them, or remove their folders in {options.work} first"
        console.print(f"failed: {', '.join(sorted(failed))}; {advice}", markup=False)
    return 1 if failed else 0


def _parse(args: Sequence[str]) -> argparse.Namespace:
    presets = sorted(Path(name).stem for name in configs.listing() if name.startswith("models/"))
    kinds = sorted(set(presets) & set(plugins.names("models")))
    parser = argparse.ArgumentParser(prog="hpcmlip bench learning", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="raw file with GFN1-xTB and GFN2-xTB labels")
    parser.add_argument("--out", type=Path, required=True, help="folder for learning.json and learning.md")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="stores and runs; keep it to go on")
    parser.add_argument(
        "--models", nargs="+", choices=presets, default=kinds, metavar="PRESET", help="default: that of each kind"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="PRESET:KEY=VALUE", help="settings that replace those of a preset"
    )
    parser.add_argument("--minutes", type=float, default=6.0, help="CPU minutes of training steps a run")
    parser.add_argument("--heavy-atoms", type=int, default=4, help="molecules with at most so many")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    options = parser.parse_args(args)
    if not options.data.is_file():
        raise ConfigError(f"there is no raw file {options.data}")
    options.work, options.out = options.work.absolute(), options.out.absolute()
    wrong = [text for text in options.set if text.partition(":")[0] not in presets]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: expected PRESET:KEY=VALUE with one of {', '.join(presets)}")
    return options


class _Job:
    """One model in one experiment."""

    def __init__(self, preset: str, experiment: str, options: argparse.Namespace):
        self.preset, self.experiment, self.options = preset, experiment, options
        self.name = f"{preset}-{experiment}"
        self.folder = options.work / self.name
        own = [text.removeprefix(f"{preset}:") for text in options.set if text.startswith(f"{preset}:")]
        self.values = run_values(preset, experiment, own)
        self.identity = {
            "run": self.values,
            "data": [options.data.name, options.data.stat().st_size, options.heavy_atoms],
            "minutes": options.minutes,
        }

    def record(self) -> dict | None:
        """What was written about this run when it ended, if it has and nothing it depends on was changed since."""
        return self._read("record.json")

    def run(self, commands: Commands) -> dict:
        """The record; made now if there is none."""
        found = self.record()
        if found is None:
            plan = self._read("plan.json") or self._plan(commands)
            found = plan | self._train_and_evaluate(plan, commands)
            self._write("record.json", found)
        return found

    def _read(self, name: str) -> dict | None:
        path = self.folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        return found if found.get("identity") == self.identity else None

    def _write(self, name: str, values: dict) -> None:
        write_atomic(self.folder / name, json.dumps(values | {"identity": self.identity}, indent=1))

    def _store(self, every: int, commands: Commands) -> Path:
        with _SHARDING:
            return make_store(self.options.data, self.options.work, self.options.heavy_atoms, every, commands)

    def _config(self, store: Path, **train) -> tuple[Path, RunConfig]:
        """RUN.yaml in the folder of this run."""
        values = json.loads(json.dumps(self.values))
        values["data"]["stores"] = [str(store)]
        values["train"] |= train
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path, from_values(RunConfig, values, self.folder, where=str(path))

    def _plan(self, commands: Commands) -> dict:
        """Epochs, and the part of the structures, that take the budget; from the CPU time of some steps."""
        shutil.rmtree(self.folder, ignore_errors=True)
        store = self._store(1, commands)
        path, config = self._config(store, epochs=10**6, validate_every=10**6)
        steps = steps_per_epoch(config)
        budget = 60 * self.options.minutes
        seconds = commands.seconds_per_step(path, self.folder / "calibration", min(CALIBRATION_SECONDS, budget / 2))
        shutil.rmtree(self.folder / "calibration")
        epochs, every = fit(budget, seconds * steps)
        plan = {"preset": self.preset, "experiment": self.experiment, "epochs": epochs, "every": every}
        self._write("plan.json", plan | {"seconds_per_step": seconds})
        return self._read("plan.json")

    def _train_and_evaluate(self, plan: dict, commands: Commands) -> dict:
        store, full = self._store(plan["every"], commands), self._store(1, commands)
        epochs, run_dir = plan["epochs"], self.folder / "run"
        path, config = self._config(store, epochs=epochs, validate_every=-(-epochs // VALIDATIONS))
        was_begun = run_dir.exists()
        train_cpu = commands.run("train", path, "--run-dir", run_dir, log=self.folder / "train.txt")
        evaluation = self.folder / "evaluation"
        command = ("evaluate", run_dir, "--data", full, "--split", "test", "--out", evaluation)
        evaluate_cpu = commands.run(*command, log=self.folder / "evaluate.txt")
        found = json.loads((evaluation / "metrics.json").read_text())
        dataset, steps = Dataset.open([store], config.data.levels), steps_per_epoch(config) * epochs
        potential = Potential(config.model, dataset.spec, seed=0)
        return {
            "lr": config.optim.lr,
            "parameters": sum(p.numel() for p in potential.parameters() if p.requires_grad),
            "structures": dataset.count("train"),
            "steps": steps,
            "cpu_seconds": {
                "steps_planned": round(plan["seconds_per_step"] * steps, 1),
                # of an interrupted run only the last part is known
                "train": None if was_begun else round(train_cpu, 1),
                "evaluate": round(evaluate_cpu, 1),
            },
            "levels": found["levels"],
            "baseline": found["baseline"],
            "versions": found["versions"],
        }


def run_values(preset: str, experiment: str, overrides: Sequence[str]) -> dict:
    """RUN.yaml as plain values, without stores and epochs: model, loss and optimizer of the preset, one cycle of rates.

    Weights of the loss: those of the preset's first level with forces for GFN1, of its last with energies for GFN2.
    """
    config = load(RunConfig, configs.path(f"models/{preset}.yaml"), overrides)
    values = json.loads(config.model_dump_json())
    weights = {level: config.weights(level) for level in config.data.levels}
    with_forces = [w for level, w in weights.items() if config.data.levels[level] == "EF"]
    with_energies = [w for w in weights.values() if w.energy]
    chosen = {LOW: [*with_forces, LevelWeights()][0], HIGH: [LevelWeights(), *with_energies][-1]}
    levels = EXPERIMENTS[experiment]
    schedule = {"kind": "one_cycle", "rise": 0.2, "min_lr": 0.0}
    return {
        "name": f"{preset}-{experiment}",
        "data": {"levels": levels, "pairs_per_batch": 5000},
        "model": values["model"],
        "loss": values["loss"] | {"weights": {level: chosen[level].model_dump() for level in levels}},
        "optim": values["optim"] | {"schedule": schedule},
        "train": {"micro_batches_per_step": 1, "checkpoint_minutes": 1.0, "log_seconds": 1.0, "seed": 0},
        "engine": {"device": "cpu", "zero_stage": 0},
    }


def steps_per_epoch(config: RunConfig) -> int:
    """Of a run on one process."""
    loader = setup.open_loader(config, Dataset.open(config.data.stores, config.data.levels), World())
    return loader.steps(0)


def fit(budget: float, epoch: float) -> tuple[int, int]:
    """(epochs, n): how often the training split is seen in `budget` seconds if once takes `epoch` seconds.

    If less than two thirds of it can be seen once, only every n-th structure is used.
    """
    times = budget / epoch
    return (max(1, round(times)), 1) if times > 2 / 3 else (1, max(2, round(1 / times)))
