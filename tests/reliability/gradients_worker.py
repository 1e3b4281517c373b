"""Started by torchrun: gradients of one optimizer step through the engine, against plain torch in float64.

    gradients_worker.py CONFIG.json STORE OUT

For ZeRO 0, 1, 2 and 1 and 4 micro-batches a rank; the forces taken inside of the engine's module ("inside"), and at
ZeRO 1 outside of it too, from the energies that it gives back ("outside"). Rank 0 leaves the relative differences in
OUT/differences.json.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from torch import nn

from hpcmlip import dist, launch
from hpcmlip.batch import AtomsBatch, Prediction
from hpcmlip.config import RunConfig, from_values
from hpcmlip.data.dataset import Dataset
from hpcmlip.launch import World
from hpcmlip.models.potential import Potential, _Leaves
from hpcmlip.training import setup
from hpcmlip.training.engine import Engine, MicroBatch
from hpcmlip.training.objective import Objective

CASES = [(stage, count, "inside") for stage in (0, 1, 2) for count in (1, 4)] + [(1, 4, "outside")]


class ForcesOutside:
    """The engine of DeepSpeed as a caller would have it who takes forces from the energies that it gives back."""

    def __init__(self, wrapped: nn.Module, objective: Objective):
        self._wrapped, self._objective = wrapped, objective

    def __call__(self, blocks: MicroBatch) -> torch.Tensor:
        for block in blocks:
            block.pos.requires_grad_()
        with torch.enable_grad():
            self._objective.forward = self._energies
            said = self._wrapped(blocks)
            del self._objective.forward
            found = [self._prediction(*pair) for pair in zip(blocks, said, strict=True)]
        return self._objective.sums(blocks, found)

    def _energies(self, blocks: MicroBatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        said = [self._objective.potential._evaluate(_Leaves(block, block.pos)) for block in blocks]
        # tensors, which DeepSpeed finds and hooks, not objects of ours, which it overlooks
        return [(each.energy, each.terms) for each in said]

    def _prediction(self, block: AtomsBatch, said: tuple[torch.Tensor, torch.Tensor]) -> Prediction:
        energy, terms = said
        slopes = [
            torch.autograd.grad(energy[:, level].sum(), block.pos, create_graph=True)[0]
            for level in self._objective.spec.force_levels
        ]
        return Prediction(energy, -torch.stack(slopes, dim=1), terms)

    def __getattr__(self, name: str):
        return getattr(self._wrapped, name)


def engine_gradients(config: RunConfig, objective: Objective, world: World, step, how: str) -> torch.Tensor:
    """From the first moment of Adam after the first step: (1 - beta1) times the gradient."""
    engine = Engine(objective, config, world, torch.device("cpu"))
    if how == "outside":
        engine._deepspeed = ForcesOutside(engine._deepspeed, engine.objective)
    assert engine.step(step, 1e-3).applied
    moments = engine.gather_state()["exp_avg"]
    return torch.cat([moments[name].double().flatten() for name in sorted(moments)]) / (1 - config.optim.betas[0])


def reference_gradients(objective: Objective, step) -> torch.Tensor:
    """All micro-batches as one batch, in float64."""
    objective = objective.double().train()
    blocks = [block.to(dtype=torch.float64) for blocks in step for block in blocks]
    objective.value(objective(blocks)).backward()
    found = {n: p.grad for n, p in objective.potential.named_parameters() if p.requires_grad}
    return torch.cat([found[name].flatten() for name in sorted(found)])


def difference(values: dict, store: Path, world: World, stage: int, count: int, how: str) -> float:
    values["data"] |= {"stores": [str(store)]}
    values["optim"] |= {"kind": "adam", "weight_decay": 0.0, "clip_norm": 0.0}
    values["train"] |= {"micro_batches_per_step": count * world.size}
    values["engine"] |= {"zero_stage": stage}
    config = from_values(RunConfig, values, Path.cwd(), where="test")
    dataset = Dataset.open(config.data.stores, config.data.levels)
    objective = Objective(Potential(config.model, dataset.spec, seed=1), config)
    whole, own = (setup.open_loader(config, dataset, each) for each in (World(), world))
    all_blocks, blocks = next(whole.batches(0)), next(own.batches(0))
    expected = reference_gradients(copy.deepcopy(objective), all_blocks)
    found = engine_gradients(config, objective, world, blocks, how)
    whole.close()
    own.close()
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    values, store, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), Path(sys.argv[3])
    world = launch.detect()
    dist.start(world, folder=out, device=torch.device("cpu"), timeout_minutes=2)
    found = {}
    for stage, count, how in CASES:
        found[f"{stage} {count} {how}"] = difference(copy.deepcopy(values), store, world, stage, count, how)
    if world.rank == 0:
        (out / "differences.json").write_text(json.dumps(found))
    dist.stop()


if __name__ == "__main__":
    main()
