"""Started by torchrun on two ranks: non-finite numbers on one rank must change no weight on any.

    bad_step_worker.py CONFIG.json STORE OUT

For each ZeRO stage: a good step, a step with an infinite label on rank 1, a step whose gradient overflows on rank 1, a
good step. Leaves what happened as OUT/stage<S>.rank<R>.json. Beside it: sums through the engine against plain torch.
"""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch

from hpcmlip import dist
from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.dataset import Dataset
from hpcmlip.models.potential import Potential
from hpcmlip.training import setup
from hpcmlip.training.engine import Engine
from hpcmlip.training.objective import Objective

LR = 1e-3


def snapshot(engine) -> torch.Tensor:
    """Weights and moments of all ranks as one vector."""
    groups = engine.gather_state().values()
    return torch.cat([tensor.flatten() for group in groups for tensor in group.values()])


def with_infinite_label(micro_batch):
    first, *others = micro_batch
    energy = first.energy.clone()
    energy[0, 0] = torch.inf
    return (dataclasses.replace(first, energy=energy), *others)


def overflowing(engine):
    """A hook that makes the gradient of one parameter infinite; the losses stay finite."""
    parameter = next(iter(engine.parameters().values()))
    return parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))


def stage_report(stage: int, values: dict, store: Path, world) -> dict:
    values["data"] |= {"stores": [str(store)]}
    values["train"] |= {"micro_batches_per_step": 4}
    values["engine"] |= {"zero_stage": stage}
    config = from_values(RunConfig, values, Path.cwd(), where="test")
    dataset = Dataset.open(config.data.stores, config.data.levels)
    loader = setup.open_loader(config, dataset, world)
    engine = Engine(
        Objective(Potential(config.model, dataset.spec, seed=0), config), config, world, torch.device("cpu")
    )
    stream, report = loader.batches(0), {"applied": [], "unchanged": [], "sources": []}
    before = snapshot(engine)
    for kind in ("good", "infinite", "overflow", "good"):
        step = next(stream)
        if kind == "infinite" and world.rank == 1:
            step = [step[0], with_infinite_label(step[1])]
            report["injected"] = [int(i) for i in step[1][0].source[0]]
        hook = overflowing(engine) if kind == "overflow" and world.rank == 1 else None
        result = engine.step(step, LR, (1.0,))
        if hook is not None:
            hook.remove()
        if kind == "infinite":
            report["sources"] = engine.bad_sources(step)
        after = snapshot(engine)
        report["applied"].append(result.applied)
        report["unchanged"].append(bool(torch.equal(before, after)))
        report["flags"] = result.flags
        before = after
    loader.close()
    report["finite"] = bool(torch.isfinite(before).all())
    own = torch.cat([p.detach().flatten() for p in engine.parameters().values()])
    report["same_on_ranks"] = all(other == own.tolist() for other in dist.gather(own.tolist()))
    report["forces_equal"] = forces_equal(engine, next(loader.batches(1)))
    loader.close()
    return report


def forces_equal(engine, step) -> bool:
    """Sums with the forces inside through DeepSpeed's forward against the bare module, bit for bit."""
    bare = copy.deepcopy(engine.objective).train()
    return all(torch.equal(engine._deepspeed(blocks), bare(blocks)) for blocks in step)


def main() -> None:
    values, store, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(sys.argv[3])
    world = dist.detect()
    dist.start(world, folder=out, device=torch.device("cpu"), timeout_minutes=2)
    for stage in (0, 1, 2):
        report = stage_report(stage, copy.deepcopy(values), store, world)
        (out / f"stage{stage}.rank{world.rank}.json").write_text(json.dumps(report))
    dist.stop()


if __name__ == "__main__":
    main()
