"""Started by torchrun: trains some steps for each case of a JSON list and leaves the parameters behind.

    steps_worker.py CASES.json STORE OUT

CASES.json holds {"config": RUN.yaml as plain values, "cases": [...]}. A case is {"name", "mode", "micro_batches",
"steps"} with "stage", "clip_norm", "loss" and "optim" where they matter. `mode` "engine" is the real one; "restored"
is it too, given up half-way for a new one that begins with the state of the first. "torch" knows no DeepSpeed and
no accumulation: a process takes its micro-batches as one batch, differentiates their objective and averages the
gradients over ranks. On one rank that is the reference; on several it is the mistake that the engine must not make, a
mean of the ranks' RMSEs.
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import safetensors.torch
import torch

from hpcmlip import dist, launch
from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.dataset import Dataset
from hpcmlip.models.potential import Potential
from hpcmlip.training import setup
from hpcmlip.training.engine import Engine
from hpcmlip.training.objective import Objective
from hpcmlip.training.optimizers import OPTIMIZERS
from hpcmlip.training.schedules import Plateau, Position, rate


def run_config(values: dict, store: Path, case: dict) -> RunConfig:
    """The given config for the settings of a case, with every weight of the loss in use."""
    values["data"] |= {"stores": [str(store)], "pairs_per_batch": 1250}
    values["loss"]["weights"] = {
        "dz": {"energy": 1, "forces": 1, "hierarchicality": 1},
        "cc": {"energy": 1, "hierarchicality": 1},
    }
    values["loss"] = case.get("loss", values["loss"])
    values["optim"] |= {"clip_norm": case.get("clip_norm", 0.0), **case.get("optim", {})}
    values["train"] |= {"micro_batches_per_step": case["micro_batches"]}
    values["engine"] |= {"zero_stage": case.get("stage", 0)}
    return from_values(RunConfig, values, Path.cwd(), where="demo_mf.yaml")


def thin_labels(block, *, drop_cc: bool):
    """The block with labels missing here and there, in ways that differ between structures and micro-batches."""
    row = torch.from_numpy(block.source[:, 3])
    energy, forces = block.energy.clone(), block.forces.clone()
    energy[row % 3 == 0, 0] = torch.nan
    energy[(row % 2 == 0) | torch.tensor(drop_cc), 1] = torch.nan
    forces[block.topology.lift_structures(row % 5 == 0)] = torch.nan
    return dataclasses.replace(block, energy=energy, forces=forces)


def train_steps(loader, config: RunConfig, case: dict, first_stream: int):
    """(learning rate, micro-batches) of each step; in every third, stream 0 sees no label of the second level."""
    done, epoch = 0, 0
    while done < case["steps"]:
        steps = loader.steps(epoch)
        for i, step in enumerate(loader.batches(epoch)):
            position = Position(step=done, epoch=epoch + i / steps, epochs=config.train.epochs, warmup_epochs=0.0)
            blocks = [
                tuple(thin_labels(block, drop_cc=done % 3 == 0 and first_stream + m == 0) for block in blocks)
                for m, blocks in enumerate(step)
            ]
            yield rate(config.optim, position, Plateau()), blocks
            done += 1
            if done == case["steps"]:
                break
        epoch += 1
    loader.close()


def engine_steps(objective, config, world, steps) -> dict[str, torch.Tensor]:
    engine = Engine(objective, config, world, torch.device("cpu"))
    for lr, step in steps:
        assert engine.step(step, lr).applied
    return engine.gather_state()["master"]


def restored_steps(objective, config, world, steps) -> dict[str, torch.Tensor]:
    """As `engine_steps`, with a new engine and new weights half-way, into which the state is read back."""
    engine = Engine(objective, config, world, torch.device("cpu"))
    steps = list(steps)
    for number, (lr, step) in enumerate(steps):
        if number == len(steps) // 2:
            state = engine.gather_state()
            fresh = Objective(Potential(config.model, objective.spec, seed=4), config)
            engine = Engine(fresh, config, world, torch.device("cpu"))
            engine.restore_state(state, number)
        assert engine.step(step, lr).applied
    return engine.gather_state()["master"]


def torch_steps(objective, config, world, steps) -> dict[str, torch.Tensor]:
    """The micro-batches of this process as one batch; gradients averaged over ranks: exact on one rank only."""
    parameters = {n: p for n, p in objective.potential.named_parameters() if p.requires_grad}
    settings = config.optim.model_dump(include={"lr", "betas", "eps", "weight_decay"})
    optimizer = OPTIMIZERS[config.optim.kind](parameters.values(), **settings)
    objective.train()
    for lr, step in steps:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        objective.value(objective([block for blocks in step for block in blocks])).backward()
        for p in parameters.values():
            p.grad = dist.all_sum(p.grad) / world.size
        if config.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.optim.clip_norm)
        optimizer.step()
    return parameters


MODES = {"engine": engine_steps, "restored": restored_steps, "torch": torch_steps}


def main() -> None:
    listing, store, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(sys.argv[3])
    world = launch.detect()
    dist.start(world, folder=out, device=torch.device("cpu"), timeout_minutes=2)
    for case in listing["cases"]:
        config = run_config(copy.deepcopy(listing["config"]), store, case)
        dataset = Dataset.open(config.data.stores, config.data.levels)
        loader = setup.open_loader(config, dataset, world)
        objective = Objective(Potential(config.model, dataset.spec, seed=3), config)
        first = world.rank * case["micro_batches"] // world.size
        parameters = MODES[case["mode"]](objective, config, world, train_steps(loader, config, case, first))
        if world.rank == 0:
            tensors = {name: tensor.detach().clone() for name, tensor in parameters.items()}
            safetensors.torch.save_file(tensors, out / f"{case['name']}.{world.size}.safetensors")
    dist.stop()


if __name__ == "__main__":
    main()
