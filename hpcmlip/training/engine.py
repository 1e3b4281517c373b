"""One optimizer step through DeepSpeed: ZeRO stage 0, 1 or 2, exact global normalization, none on non-finite numbers.

Known of DeepSpeed 0.19 (read in its source, and tested here): forces must be taken inside the wrapped module;
`gradient_clipping` is 1.0 unless given; stages 1 and 2 skip a step whose global gradient norm is not finite, stage 0
does not look; gradients are averaged over ranks, hence the factor in `surrogate`.
"""

import argparse
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hpcmlip import dist
from hpcmlip.batch import AtomsBatch
from hpcmlip.config import OptimSection, RunConfig
from hpcmlip.launch import World
from hpcmlip.training.errors import batch_errors
from hpcmlip.training.objective import Objective, surrogate
from hpcmlip.training.optimizers import MOMENTS, OPTIMIZERS, initial_state

log = logging.getLogger(__name__)

MicroBatch = tuple[AtomsBatch, ...]


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after a step."""

    loss: float
    """Objective of the step in `Objective.unit`; not finite for a bad step."""
    applied: bool
    """Were the weights updated?"""
    flags: tuple[float, ...]
    """The flags handed in, added over ranks."""


class Engine:
    """An objective under DeepSpeed: `step` it, read and set its state."""

    def __init__(self, objective: Objective, config: RunConfig, world: World, device: torch.device):
        self.world, self.device = world, device
        self.objective = objective.to(device)
        self._stage = config.engine.zero_stage
        per_rank = config.train.micro_batches_per_step // world.size
        self._deepspeed = _initialize(self.objective, config, world, per_rank)
        dist.limit_waiting(config.engine.timeout_minutes)
        self._prepare_moments()

    # ------------------------------------------------------------------------------------------------------- a step

    def step(self, micro_batches: Sequence[MicroBatch], lr: float, flags: Sequence[float] = ()) -> StepResult:
        """One optimizer step over the micro-batches of all ranks; `flags` ride on its one reduction of sums.

        Nothing is updated, on any rank, if the sums or the gradients are not finite.
        """
        for group in self._deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if len(micro_batches) > 1 and not self.objective.needs_sums:
            return self._step_by_counts(micro_batches, flags)
        local = self._local_sums(micro_batches)
        total, flags = self._reduced(sum(sums.detach() for _, sums in local), flags)
        loss = float(self.objective.value(total))
        if not (math.isfinite(loss) and bool(torch.isfinite(total).all())):
            return StepResult(math.nan, False, flags)
        slope = self.objective.slope(total).to(self.device)
        for i, (blocks, sums) in enumerate(local):
            with_graph = sums if i == 0 else self._deepspeed(blocks)
            self._backward(with_graph, slope, is_last=i == len(local) - 1)
        return StepResult(loss, self._apply(), flags)

    def _step_by_counts(self, micro_batches: Sequence[MicroBatch], flags: Sequence[float]) -> StepResult:
        """A step where the numbers of labels of all ranks give the slope, so that each micro-batch is passed once."""
        counts = dist.all_sum(sum(self.objective.counts(blocks) for blocks in micro_batches))
        slope, total = self.objective.slope(counts).to(self.device), 0.0
        self._deepspeed.train()
        for i, blocks in enumerate(micro_batches):
            sums = self._deepspeed(tuple(block.to(self.device) for block in blocks))
            total = total + sums.detach()
            is_last = i == len(micro_batches) - 1
            if is_last:
                total, flags = self._reduced(total, flags)
                loss = float(self.objective.value(total))
                if not (math.isfinite(loss) and bool(torch.isfinite(total).all())):
                    # gradients of the others are there already: spoilt altogether, they are refused on every rank
                    loss, slope = math.nan, slope * math.nan
            self._backward(sums, slope, is_last=is_last)
        return StepResult(loss, self._apply(), flags)

    def _reduced(self, sums: Tensor, flags: Sequence[float]) -> tuple[Tensor, tuple[float, ...]]:
        """Sums [S], on the CPU, and flags of all ranks."""
        extra = torch.tensor(flags, dtype=sums.dtype, device=sums.device)
        reduced = dist.all_sum(torch.cat([sums, extra])).cpu()
        return reduced[: len(sums)], tuple(reduced[len(sums) :].tolist())

    def _local_sums(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[MicroBatch, Tensor]]:
        """Micro-batches with their sums, the last first and with its graph: memory holds one graph at a time."""
        *others, last = [tuple(block.to(self.device) for block in blocks) for blocks in micro_batches]
        found = []
        self._deepspeed.eval()
        for blocks in others:
            with torch.no_grad():
                found.append((blocks, self.objective(blocks)))
        self._deepspeed.train()
        return [(last, self._deepspeed(last)), *found]

    def _backward(self, sums: Tensor, slope: Tensor, *, is_last: bool) -> None:
        self._deepspeed.set_gradient_accumulation_boundary(is_last)
        self._deepspeed.backward(surrogate(sums, slope, self.world.size), scale_wrt_gas=False)

    def _apply(self) -> bool:
        """Update the weights, if all gradients are finite; were they?"""
        if self._stage == 0 and not self._gradients_finite():
            self._deepspeed.zero_grad()
            return False
        self._deepspeed.step()
        return self._deepspeed.was_step_applied()

    def _gradients_finite(self) -> bool:
        """At stage 0, where every rank holds the same averaged gradients."""
        gradients = [p.grad for p in self.parameters().values() if p.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients, torch.inf)))

    def bad_sources(self, micro_batches: Sequence[MicroBatch]) -> list[tuple[int, ...]]:
        """(store, file, group, row) of the structures of this rank whose energies, forces or labels are not finite."""
        bad = []
        self._deepspeed.eval()
        for blocks in micro_batches:
            moved = [block.to(self.device) for block in blocks]
            with torch.no_grad():
                predictions = self.objective.potential(moved)
            for block, prediction in zip(moved, predictions, strict=True):
                wrong = torch.zeros_like(block.weight, dtype=torch.bool)
                for prop, (error, _) in batch_errors(block, prediction).items():
                    rows = (~torch.isfinite(error)).flatten(1).any(1)
                    wrong |= rows if prop == "energy" else block.topology.sum_atoms(rows.double()) > 0
                bad += [tuple(map(int, source)) for source in block.source[wrong.cpu().numpy()]]
        self._deepspeed.train()
        return bad

    # -------------------------------------------------------------------------------------------------------- state

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters of the potential by name; at these stages every rank holds them whole."""
        return {n: p for n, p in self.objective.potential.named_parameters() if p.requires_grad}

    def constants(self) -> dict[str, Tensor]:
        """What of the potential's state is not trained, on the CPU: frozen parameters and buffers."""
        state, trained = self.objective.potential.state_dict(), self.parameters()
        return {name: tensor.cpu().contiguous() for name, tensor in state.items() if name not in trained}

    def gather_state(self) -> dict[str, dict[str, Tensor]]:
        """{"master" | moment: {parameter: fp32 tensor on the CPU}}, whole on every rank. A collective."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        state: dict[str, dict[str, Tensor]] = {key: {} for key in ("master", *MOMENTS)}
        for name, p in self.parameters().items():
            whole = p.detach() if self._stage == 0 else safe_get_full_fp32_param(p)
            state["master"][name] = whole.float().cpu().clone()
            for key in MOMENTS:
                inner = self._inner.state[p][key] if self._stage == 0 else safe_get_full_optimizer_state(p, key)
                state[key][name] = inner.float().cpu().clone()
        return state

    def restore_state(self, state: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Set what `gather_state` gave, at any stage and on any number of ranks, after `updates` optimizer updates."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        with torch.no_grad():
            for name, p in self.parameters().items():
                p.copy_(state["master"][name])
                if self._stage != 0:
                    safe_set_full_fp32_param(p, p.detach().float())
                for key in MOMENTS:
                    value = state[key][name].to(self.device)
                    if self._stage == 0:
                        self._inner.state[p][key].copy_(value)
                    else:
                        safe_set_full_optimizer_state(p, value, key)
        for held in self._inner.state.values():
            held["step"].fill_(float(updates))

    @property
    def _inner(self) -> torch.optim.Optimizer:
        """The torch optimizer, which at stages 1 and 2 sits inside DeepSpeed's."""
        return self._deepspeed.optimizer if self._stage == 0 else self._deepspeed.optimizer.optimizer

    def _prepare_moments(self) -> None:
        """Make the optimizer's state now: torch does it at the first update, too late for restoring into it."""
        for group in self._inner.param_groups:
            for p in group["params"]:
                self._inner.state[p] = initial_state(self._inner, p)
        if self._stage != 0:
            # tells the parameters where their pieces lie in the flat state; DeepSpeed calls it after the first update
            self._deepspeed.optimizer._lazy_init_hp_params_optimizer_state()


def _initialize(objective: Objective, config: RunConfig, world: World, per_rank: int):
    """The DeepSpeed engine on the process group that `dist.start` made."""
    place = next(objective.parameters()).device
    device = place.type
    # read when DeepSpeed is first imported; its own guess would take a GPU that the config does not want
    os.environ.setdefault("DS_ACCELERATOR", device)
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    deepspeed = _import_deepspeed()
    from deepspeed.utils import groups

    # DeepSpeed's own call, at every step of stages 1 and 2
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    if groups._WORLD_GROUP not in torch.distributed.distributed_c10d._world.pg_map:
        groups._WORLD_GROUP = None  # of an earlier run in this process, whose group is gone
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    trainable = [p for p in objective.parameters() if p.requires_grad]
    engine, _, _, _ = deepspeed.initialize(
        # the GPU that was chosen; where each task sees only its own, that is not the local rank
        args=argparse.Namespace(device_rank=place.index or 0),
        model=objective,
        optimizer=_optimizer(config.optim, trainable),
        dist_init_required=False,
        config=_deepspeed_config(config, per_rank, world, sum(p.numel() for p in trainable)),
    )
    return engine


def _import_deepspeed() -> ModuleType:
    """DeepSpeed without what no run here uses."""
    # Its optimizer Muon loads the compiler of torch when it is imported, which takes longer than DeepSpeed itself, and
    # every first step imports it to see that the optimizer is another one. Its autotuner imports mlflow.
    for name, value in (("muon_optimizer", "MuonWithAuxAdam"), ("original_muon", "muon_update")):
        absent = ModuleType(f"deepspeed.runtime.zero.muon.{name}")
        setattr(absent, value, type(value, (), {}))
        sys.modules.setdefault(absent.__name__, absent)
    sys.modules.setdefault("mlflow", None)
    import deepspeed
    import deepspeed.ops

    if sys.modules["mlflow"] is None:
        del sys.modules["mlflow"]
    # No operator is wanted: the only one that would be loaded, shared memory for tensor-parallel inference, takes a
    # compiler and up to 90 s to build, and a build that is killed leaves a lock on which every later start waits for
    # ever. Set, not edited: reading it first would probe the machine's compilers for all operators.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _optimizer(optim: OptimSection, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return OPTIMIZERS[optim.kind](
        parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )


def _deepspeed_config(config: RunConfig, per_rank: int, world: World, num_weights: int) -> dict:
    bucket = num_weights + num_weights % 2  # an odd one is refused
    return {
        # only their product matters to DeepSpeed; ours are micro-batches of changing size
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": per_rank,
        "train_batch_size": per_rank * world.size,
        "gradient_clipping": config.optim.clip_norm,
        "prescale_gradients": False,
        # its own bucket is 2 GB, which would be taken of a GPU whatever the model
        "zero_optimization": {
            "stage": config.engine.zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
        # it would wait for the GPU around every pass
        "timers": {"throughput": {"enabled": False}},
    }
