"""What a run leaves in its directory: checkpoints, best model, record of its end. Every method is a collective."""

import dataclasses
import json
import logging
import os
import platform
import sys
from dataclasses import dataclass, field
from pathlib import Path

import hpcmlip
from hpcmlip import dist
from hpcmlip.config import RunConfig
from hpcmlip.data.dataset import Dataset
from hpcmlip.errors import RunError
from hpcmlip.launch import World
from hpcmlip.models.export import save_model
from hpcmlip.training import checkpoint, rundir
from hpcmlip.training.average import Average
from hpcmlip.training.engine import Engine
from hpcmlip.training.metrics import METRICS, truncate
from hpcmlip.training.schedules import Plateau

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """Where a run stands; with the weights, all that it needs to go on."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    epoch: int = 0
    step_in_epoch: int = 0
    updates: int = 0
    """Steps that changed the weights."""
    bad_steps: int = 0
    validated_step: int = 0
    """Step of the last validation."""
    plateau: Plateau = field(default_factory=Plateau)
    best: dict | None = None
    """step, epoch and objective of the best validation."""


class Records:
    """Writes and reads what outlives the process; rank 0 holds the pen, an error there is an error everywhere."""

    def __init__(
        self, config: RunConfig, run_dir: Path, world: World, *, dataset: Dataset, engine: Engine, average: Average
    ):
        self._config, self._run_dir, self._world = config, run_dir, world
        self._dataset, self._engine, self._average = dataset, engine, average
        self._checkpoints = run_dir / rundir.CHECKPOINTS
        self._saved: Progress | None = None
        self._restarts = 0

    def save(self, progress: Progress) -> None:
        """Write a checkpoint of this step boundary, if there is none yet."""
        if progress == self._saved:
            return
        tensors = self._engine.gather_state()
        if self._average.tensors:
            tensors["average"] = {name: tensor.cpu() for name, tensor in self._average.tensors.items()}
        if self._config.transfer is not None:  # the model that they came from may be gone when the run goes on
            tensors["constants"] = self._engine.constants()
        state = {
            "progress": dataclasses.asdict(progress),
            "average_updates": self._average.updates,
            "data": self._data(),
            "config": json.loads(self._config.model_dump_json()),
            "versions": _versions(),
            "restarts": self._restarts,
            "written_by": {"ranks": self._world.size, "zero_stage": self._config.engine.zero_stage},
        }
        with dist.together("writing the checkpoint"):
            if self._world.rank == 0:
                self._write(progress, state, tensors)
        self._saved = progress

    def _write(self, progress: Progress, state: dict, tensors: checkpoint.Tensors) -> None:
        try:
            checkpoint.write(self._checkpoints, progress.step, state, tensors)
        except OSError as error:
            size = sum(tensor.nbytes for group in tensors.values() for tensor in group.values())
            raise RunError(
                f"the checkpoint of step {progress.step} ({size:,} bytes) cannot be written into "
                f"{self._checkpoints} ({error.strerror}): make room there and start again, older ones are whole"
            ) from error
        best = progress.best["step"] if progress.best else None
        checkpoint.prune(self._checkpoints, progress.step, self._config.train.keep_checkpoints, best)

    def resume(self) -> Progress:
        """Set weights, moments and averages from the newest sound checkpoint, if there is one; where to go on from."""
        progress, step = Progress(), self._newest_step()
        if step is not None:
            with dist.together("reading the checkpoint"):
                found = checkpoint.read(self._checkpoints / checkpoint.name(step))
                values = found.state["progress"]
                progress = Progress(**{**values, "plateau": Plateau(**values["plateau"])})
                self._engine.restore_state(found.tensors, progress.updates)
                if self._config.transfer is not None:
                    self._engine.objective.potential.load_state_dict(found.tensors["constants"], strict=False)
                self._average.restore(found.tensors.get("average", {}), found.state["average_updates"])
                self._restarts = found.state.get("restarts", 0) + 1
                self._saved = progress
                log.info("going on from %s", found.path)
                _compare_versions(found.state["versions"])
        with dist.together("opening the metrics"):
            if self._world.rank == 0:
                path = self._run_dir / METRICS
                truncate(path, step=progress.step, validated_step=progress.validated_step)
        return progress

    def _newest_step(self) -> int | None:
        step = None
        with dist.together("reading the checkpoint"):
            found = checkpoint.newest(self._checkpoints) if self._world.rank == 0 else None
            if found is not None:
                step = int(found.state["step"])
                self._check_data([item["digest"] for item in found.state["data"]])
        return dist.broadcast(step)

    def _check_data(self, digests: list[str]) -> None:
        if digests != [store.digest for store in self._dataset.stores]:
            stores = ", ".join(str(path) for path in self._config.data.stores)
            raise RunError(
                f"{stores} no longer hold the data that this run began with (the digest differs): "
                "restore them, or choose another --run-dir"
            )

    def export(self, progress: Progress) -> None:
        """Write the weights that are in place now (averaged where there is an average) as the run's model."""
        card = {"best": progress.best, "data": self._data(), "versions": _versions()}
        with dist.together("writing the model"):
            if self._world.rank == 0:
                self._save_model(card)

    def _save_model(self, card: dict) -> None:
        potential = self._engine.objective.potential
        try:
            save_model(self._run_dir, potential, config=self._config, card=card)
        except OSError as error:
            size = sum(tensor.nbytes for tensor in potential.state_dict().values())
            raise RunError(
                f"the model ({size:,} bytes) cannot be written into {self._run_dir} ({error.strerror}): "
                "make room there and start again"
            ) from error

    def finish(self, progress: Progress, reason: str) -> None:
        """Last checkpoint and the record of the end. Raises RunError if there is no model to show for it."""
        if progress.best is None:
            raise RunError(
                "no validation gave a finite value, so there is no model: look at the labels, lower optim.lr"
            )
        self.save(progress)
        with dist.together("writing the record of the end"):
            if self._world.rank == 0:
                record = {"reason": reason, "step": progress.step, "best": progress.best, "restarts": self._restarts}
                rundir.write_end(self._run_dir, record | {"data": self._data(), "versions": _versions()})
        best = progress.best
        log.info("finished: %s; best validation %.5g at step %d", reason, best["objective"], best["step"])

    def prune(self, progress: Progress, reason: str) -> None:
        """Last checkpoint and the record of an end before the end, for which there need not be a model."""
        self.save(progress)
        with dist.together("writing the record of the end"):
            if self._world.rank == 0:
                rundir.write_pruned(self._run_dir, {"reason": reason, "step": progress.step, "best": progress.best})
        log.info("ended early: %s", reason)

    def _data(self) -> list[dict]:
        return [{"path": str(store.path), "digest": store.digest} for store in self._dataset.stores]


def _compare_versions(written: dict[str, str]) -> None:
    changed = [
        f"{name} {written.get(name)} -> {here}" for name, here in _versions().items() if written.get(name) != here
    ]
    if changed:
        log.warning("it was written with other versions (%s): last digits may differ from here on", ", ".join(changed))


def _versions() -> dict[str, str]:
    modules = {name: sys.modules.get(name) for name in ("torch", "deepspeed", "numpy")}
    found = {name: str(getattr(module, "__version__", "")) for name, module in modules.items()}
    return {"hpcmlip": hpcmlip.__version__, "python": platform.python_version(), **found, "machine": os.uname().machine}
