"""Started by torchrun on two ranks: non-finite numbers on one rank must change no weight on any.

    bad_step_worker.py CASE.json STORE OUT

CASE.json: {"config": RUN.yaml as plain values, "stages": [...], "rank", "micro_batch", "value" and "property" of the
bad label, "loss": its kind, "unchecked": true to do without the finite check}. For each ZeRO stage: a good step, a
step with the bad label, a step whose gradient overflows on that rank, a good step. Leaves what happened as
OUT/stage<S>.rank<R>.json. Beside it: sums through the engine against plain torch.
"""

import copy
import dataclasses
import json
import math
import sys
import types
from pathlib import Path

import torch

from hpcmlip import dist, launch
from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.dataset import Dataset
from hpcmlip.models.potential import Potential
from hpcmlip.training import engine as engines
from hpcmlip.training import setup
from hpcmlip.training.engine import Engine
from hpcmlip.training.objective import Objective

LR = 1e-3


def snapshot(engine) -> torch.Tensor:
    """Weights and moments of all ranks as one vector."""
    groups = engine.gather_state().values()
    return torch.cat([tensor.flatten() for group in groups for tensor in group.values()])


def with_bad_label(micro_batch, case: dict):
    """The first structure of a micro-batch has a bad label."""
    first, *others = micro_batch
    labels = getattr(first, case["property"]).clone()
    labels[0, 0] = float(case["value"])
    return (dataclasses.replace(first, **{case["property"]: labels}), *others)


def without_check() -> None:
    """All numbers are finite to the engine."""
    engines.math = types.SimpleNamespace(isfinite=lambda number: True, nan=math.nan)
    engines.torch = types.SimpleNamespace(**{**vars(torch), "isfinite": lambda x: torch.ones_like(x, dtype=torch.bool)})


def overflowing(engine):
    """A hook that makes the gradient of one parameter infinite; the losses stay finite."""
    parameter = next(iter(engine.parameters().values()))
    return parameter.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))


def stage_report(stage: int, case: dict, store: Path, world) -> dict:
    values = copy.deepcopy(case["config"])
    values["data"] |= {"stores": [str(store)]}
    values["train"] |= {"micro_batches_per_step": 4}
    if case["loss"] != "rmse_mae":
        values["loss"] = {"kind": case["loss"]}
    values["engine"] |= {"zero_stage": stage}
    config = from_values(RunConfig, values, Path.cwd(), where="test")
    dataset = Dataset.open(config.data.stores, config.data.levels)
    loader = setup.open_loader(config, dataset, world)
    engine = Engine(
        Objective(Potential(config.model, dataset.spec, seed=0), config), config, world, torch.device("cpu")
    )
    stream, report = loader.batches(0), {"applied": [], "unchanged": [], "sources": []}
    before = snapshot(engine)
    is_bad = world.rank == case["rank"]
    for kind in ("good", "label", "overflow", "good"):
        step = next(stream)
        if kind == "label" and is_bad:
            step[case["micro_batch"]] = with_bad_label(step[case["micro_batch"]], case)
            report["injected"] = [int(i) for i in step[case["micro_batch"]][0].source[0]]
        hook = overflowing(engine) if kind == "overflow" and is_bad else None
        result = engine.step(step, LR, (1.0,))
        if hook is not None:
            hook.remove()
        if kind == "label":
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
    case, store, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(sys.argv[3])
    if case["unchecked"]:
        without_check()
    world = launch.detect()
    dist.start(world, folder=out, device=torch.device("cpu"), timeout_minutes=2)
    for stage in case["stages"]:
        report = stage_report(stage, case, store, world)
        (out / f"stage{stage}.rank{world.rank}.json").write_text(json.dumps(report))
    dist.stop()


if __name__ == "__main__":
    main()
