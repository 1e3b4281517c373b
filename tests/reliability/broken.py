"""`python broken.py MECHANISM ARGUMENTS...`: hpcmlip with one mechanism broken, for the controls of fault tests."""

import sys


def moments() -> None:
    """A resumed run begins with fresh optimizer moments."""
    from hpcmlip.training.engine import MOMENTS, Engine

    restore = Engine.restore_state

    def without(self, state, updates):
        restore(self, state | {key: {n: t * 0 for n, t in state[key].items()} for key in MOMENTS}, updates)

    Engine.restore_state = without


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


BROKEN = {name: value for name, value in list(globals().items()) if getattr(value, "__module__", "") == __name__}

if __name__ == "__main__":
    BROKEN[sys.argv.pop(1)]()
    from hpcmlip.cli import main

    main()
