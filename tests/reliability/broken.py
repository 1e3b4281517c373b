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


def seed_of_process() -> None:
    """A sampler of Optuna begins with the seed of the sweep in every process, not with that of the trial."""
    from hpcmlip.cluster import study

    make, made = study._sampler, []

    def once(section, seed):
        made.append(make(section, section.sampler.seed)) if not made else None
        return made[0]

    study._sampler = once


def all_results() -> None:
    """A trial is suggested from whatever results there are."""
    from hpcmlip.cluster.study import Study

    Study.first_of_generation = lambda self, number: number


MECHANISMS = (moments, position, after_success, seed_of_process, all_results)
BROKEN = {function.__name__: function for function in MECHANISMS}


if __name__ == "__main__":
    BROKEN[sys.argv.pop(1)]()
    from hpcmlip.cli import main

    main()
