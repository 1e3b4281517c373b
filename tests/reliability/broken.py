"""`python broken.py MECHANISM ARGUMENTS...`: hpcmlip with one mechanism broken, for the controls of fault tests."""

import sys


def moments() -> None:
    """A resumed run begins with fresh optimizer moments."""
    from hpcmlip.training.engine import MOMENTS, Engine

    restore = Engine.restore_state

    def without(self, state, updates):
        restore(self, state | {key: {n: t * 0 for n, t in state[key].items()} for key in MOMENTS}, updates)

    Engine.restore_state = without


def average() -> None:
    """A resumed run begins its moving average anew."""
    from hpcmlip.training.average import Average

    Average.restore = lambda self, tensors, updates: None


def position() -> None:
    """A resumed run begins its epoch again."""
    import dataclasses

    from hpcmlip.training.records import Records

    resume = Records.resume
    Records.resume = lambda self: dataclasses.replace(resume(self), step_in_epoch=0)


def after_success() -> None:
    """The evaluation waits for members that succeed."""
    from hpcmlip.cluster import scheduler

    command = scheduler.sbatch_command
    scheduler.sbatch_command = lambda *args, **kw: [w.replace("afterany", "afterok") for w in command(*args, **kw)]


def record() -> None:
    """Nobody is told that metrics.jsonl cannot be written."""
    from hpcmlip.training.metrics import MetricsFile

    MetricsFile._fail = lambda self, error, size=0: None


def board() -> None:
    """What TensorBoard's file raises is not caught."""
    from hpcmlip.training.board import Board

    def let_through(self, error):
        raise error

    Board._give_up = let_through


def fixed_port() -> None:
    """Rank 0 of every job listens on one port, and the others believe whoever answers there."""
    from torch.distributed import TCPStore

    from hpcmlip import rendezvous

    def meet(folder, key, *, rank, size, timeout):
        return TCPStore("127.0.0.1", 29511, is_master=rank == 0, wait_for_workers=False, timeout=timeout)

    rendezvous.meet = meet


def build() -> None:
    """DeepSpeed builds its shared-memory extension when it starts; the file "waits" says that it waits for another."""
    from collections import defaultdict
    from pathlib import Path

    import deepspeed.ops
    from torch.utils.file_baton import FileBaton

    wanted = defaultdict(bool, deepspeed_shm_comm=True)
    wait = FileBaton.wait

    def told(self):
        Path(self.lock_file_path).with_name("waits").touch()
        wait(self)

    FileBaton.wait = told

    class Kept(type(deepspeed.ops)):
        def __setattr__(self, name, value):
            super().__setattr__(name, wanted if name == "__compatible_ops__" else value)

    deepspeed.ops.__class__ = Kept


def all_results() -> None:
    """A trial is suggested when it begins, from whatever results there are by then."""
    from hpcmlip.cluster import sweep

    load = sweep.load_sweep

    def one_by_one(path):
        found = load(path)
        return found.model_copy(update={"optuna": found.optuna.model_copy(update={"generation": 1})})

    sweep.load_sweep = one_by_one


def agreement() -> None:
    """A rank that is asked to stop leaves without telling the others."""
    import dataclasses

    from hpcmlip.training.engine import Engine

    step = Engine.step

    def alone(self, micro_batches, lr, flags=()):
        result = step(self, micro_batches, lr, (0.0, *flags[1:]))
        return dataclasses.replace(result, flags=(flags[0], *result.flags[1:]))

    Engine.step = alone


def saving() -> None:
    """A run that is asked to stop saves nothing."""
    import os

    from hpcmlip.training.stopping import Signals

    Signals._receive = lambda self, number, frame: os._exit(75)


def plan() -> None:
    """The order of the data depends on the number of ranks."""
    from hpcmlip.training import setup

    open_loader = setup.open_loader

    def by_ranks(config, dataset, world):
        train = config.train.model_copy(update={"seed": config.train.seed + world.size})
        return open_loader(config.model_copy(update={"train": train}), dataset, world)

    setup.open_loader = by_ranks


def patience() -> None:
    """A rank waits for as long as torch lets it."""
    from hpcmlip import dist
    from hpcmlip.training.stacks import Stacks

    start = dist.start
    dist.start = lambda *arguments, timeout_minutes, **named: start(*arguments, timeout_minutes=30, **named)
    dist.limit_waiting = lambda minutes: None
    Stacks._watch = lambda self: None


def lock() -> None:
    """Nobody is turned away from a run directory."""
    import fcntl

    fcntl.flock = lambda file, how: None


def comparison() -> None:
    """The config of a run is not compared with that of its directory."""
    from hpcmlip.training import rundir

    rundir.differing = lambda old, new: []


def sharing() -> None:
    """An error on one rank is not told to the others."""
    import contextlib

    from hpcmlip import dist

    dist.together = lambda doing: contextlib.nullcontext()


BROKEN = {name: value for name, value in list(globals().items()) if getattr(value, "__module__", "") == __name__}


if __name__ == "__main__":
    BROKEN[sys.argv.pop(1)]()
    from hpcmlip.cli import main

    main()
