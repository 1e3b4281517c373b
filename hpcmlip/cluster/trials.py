"""The trials of an Optuna sweep in its experiment directory: suggested, ended by the pruner, told to the study.

The record of a trial is its run directory and its history, as of any member; the journal holds the settings that were
suggested and, as a copy, what became of each. Whoever needs the next trial brings the journal up to date under a lock:
a job that was killed has lost nothing that the next one would not find, and a trial that began is never suggested
again. Nobody has to live until the end.
"""

import contextlib
import fcntl
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from hpcmlip.cluster import activity, scheduler, study, sweep
from hpcmlip.cluster import experiment as experiments
from hpcmlip.cluster.experiment import Experiment, Growth, Member
from hpcmlip.cluster.study import Outcome, Study
from hpcmlip.cluster.sweep import OptunaSection, Sweep, Trial
from hpcmlip.config import RunConfig, changed
from hpcmlip.errors import EXIT_RESUMABLE, ConfigError, RunError
from hpcmlip.training import rundir
from hpcmlip.training.metrics import METRICS

JOURNAL = "study.journal"
_LOCK = "study.lock"
_HOPELESS = 3
"""So many trials must have failed, and none else ended, before no further one is suggested."""


class ResultsMissingError(RunError):
    """A trial cannot be suggested yet: results of earlier generations are missing, from these members."""

    def __init__(self, experiment: Experiment, member: int, missing: list[int]):
        names = ", ".join(map(experiment.name, missing[:3])) + (", ..." if len(missing) > 3 else "")
        super().__init__(
            f"{experiment.name(member)} is suggested from the results of earlier trials, of which {names} "
            f"{'has' if len(missing) == 1 else 'have'} not ended; once they have, or nobody works on them: "
            f"hpcmlip submit --retry {experiment.folder}"
        )
        self.missing = missing


def growth(asked: Sweep) -> Growth:
    """How an experiment grows to the members that SWEEP.yaml asks for."""
    return Growth(asked.optuna.trials * asked.members, asked.optuna.generation * asked.members)


def check(asked: Sweep, config: RunConfig, path: Path, before: Experiment | None) -> tuple[Member, ...]:
    """Members at the ends of the space, to be looked at before anything is submitted. `path`: SWEEP.yaml.

    Raises ConfigError for a part of Optuna that is not there, for ends that make no config, and where the experiment
    that is there (`before`) was another sweep.
    """
    study.check(asked.optuna)
    if before is not None:
        _check_same(asked, path, before)
    members = []
    for key, draw in asked.optuna.draws.items():
        for value in draw.ends:
            changed(config, {key: value}, path.parent, where=f"{path}: optuna: {key} = {value}")
            members.append(Member(f"{key} = {value}", {key: value}))
    return tuple(members)


def advance(folder: Path, member: int) -> Experiment:
    """Bring study and experiment up to date, and suggest trials until there is this member; the experiment as it is
    then. Raises ResultsMissingError while results are missing, RunError where all trials fail.
    """
    with _locked(folder):
        now = experiments.open_experiment(folder)
        asked = sweep.load_sweep(folder / experiments.SWEEP)
        before = study.read(folder / JOURNAL, asked.optuna, now.config.name)
        found = _told(before, now, asked.members)
        first = found.first_of_generation(member // asked.members)
        last = min(first + asked.optuna.generation, asked.optuna.trials)
        if len(found.trials) < last and member >= len(found.trials) * asked.members:
            _check_ended(found, now, asked.members, member, first)
            while len(found.trials) < last:
                found = found.ask(lambda trial: _check_config(now.config, trial))
        if found is not before:
            study.write(folder / JOURNAL, found)
        members = _members(found, now.config, asked)
        if members != now.members:
            now = replace(now, members=members)
            experiments.write(now, now.site_file.read_text(encoding="utf-8"))
    return now


def suggest(folder: Path, member: int) -> int:
    """Print the name of a member that has settings from now on; exit code 75 if it has none because of members on
    which somebody works. Raises as `advance`."""
    experiment = experiments.open_experiment(folder)
    if experiment.growth is None or not 0 <= member < experiment.size:
        raise ConfigError(f"{folder} is no sweep by Optuna with a trial {member}")
    try:
        experiment = advance(experiment.folder, member)
    except ResultsMissingError as error:
        print(experiment.name(member))
        queue = scheduler.states([job.id for job in activity.jobs(experiment)]) if scheduler.is_present() else {}
        if not set(error.missing) <= set(activity.look(experiment, error.missing, queue).members):
            raise
        print(error, file=sys.stderr)
        return EXIT_RESUMABLE
    print(experiment.name(member))
    return 0


class Watched:
    """A run that is a trial: its pruner may end it, and its end is told to the study."""

    def __init__(self, folder: Path, run_dir: Path):
        self._folder, self._run_dir = folder, run_dir

    @cached_property
    def _seen(self) -> tuple[Study, int]:
        """The study as it was when the trial began, of which only earlier generations matter, and the trial."""
        experiment = experiments.open_experiment(self._folder)
        asked = sweep.load_sweep(self._folder / experiments.SWEEP)
        found = study.read(self._folder / JOURNAL, asked.optuna, experiment.config.name)
        names = [member.name for member in experiment.members]
        return found, names.index(self._run_dir.name) // asked.members

    def why_stop(self) -> str | None:
        """Why the pruner ends the trial after its last validation; None: it goes on."""
        found, number = self._seen
        pruner = found.section.pruner
        reports = _reports(self._run_dir)
        if pruner is None or not found.judge(number, reports)[0]:
            return None
        return f"pruned by {pruner.kind} after epoch {max(reports) + 1}"

    def tell(self) -> None:
        """Bring the study up to date."""
        advance(self._folder, 0)


def watched(run_dir: Path) -> Watched | None:
    """The trial whose run directory this is; None for any other run."""
    run_dir = run_dir.absolute()
    folder = run_dir.parent
    if not (folder / JOURNAL).is_file() or not (folder / experiments.RECORD).is_file():
        return None
    names = [member.name for member in experiments.open_experiment(folder).members]
    return Watched(folder, run_dir) if run_dir.name in names else None


# ------------------------------------------------------------------------------------------------- files and study


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, on any node; the lock of a killed one is free."""
    with (folder / _LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _told(before: Study, experiment: Experiment, members: int) -> Study:
    """The study with what became of each trial by now; an end that counts is final, a failure may be tried again."""
    found = before
    for number, trial in enumerate(before.trials):
        if trial.state.name in ("RUNNING", "FAIL"):
            found = found.end(number, _outcome(experiment, range(number * members, (number + 1) * members)))
    return found


def _outcome(experiment: Experiment, members: range) -> Outcome | None:
    """What became of a trial, from the files of its members; None: it has not ended."""
    if members.stop > len(experiment.members):  # the job that suggested it was killed before it wrote them
        return None
    done = [_done(experiment, member) for member in members]
    states = {record["state"] for record in done}
    reports = _reports(experiment.run_dir(members.start)) if len(members) == 1 else {}
    if "" in states:
        return None
    if "failed" in states:
        return Outcome("FAIL", reports=reports)
    if rundir.PRUNED in states:
        last = reports[max(reports)] if reports else math.nan
        return Outcome("PRUNED", last if math.isfinite(last) else None, reports)
    return Outcome("COMPLETE", sum(record["best"]["objective"] for record in done) / len(done), reports)


def _done(experiment: Experiment, member: int) -> dict:
    run_dir = experiment.run_dir(member)
    ended = rundir.finished(run_dir) or rundir.pruned(run_dir)
    if ended is not None:
        return ended
    history = activity.events(experiment, member)
    return {"state": "failed" if history and history[-1].what.startswith("failed") else ""}


def _reports(run_dir: Path) -> dict[int, float]:
    """Epoch, from 0 as Optuna's pruners count steps -> validation objective, not a number where it was none."""
    found = {}
    with contextlib.suppress(FileNotFoundError):
        for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # cut off by a kill
                record = json.loads(line)
                if record["kind"] == "validation":
                    value = record["objective"]
                    found[record["epoch"]] = math.nan if value is None else value
    return found


def _check_ended(found: Study, experiment: Experiment, members: int, member: int, first: int) -> None:
    states = [trial.state.name for trial in found.trials[:first]]
    missing = [number for number in range(first) if number >= len(states) or states[number] == "RUNNING"]
    if missing:
        raise ResultsMissingError(experiment, member, [number * members for number in missing])
    if len(states) >= _HOPELESS and set(states) == {"FAIL"}:
        raise RunError(
            f"all {len(states)} trials so far have failed, so no further one is suggested: see 'hpcmlip status', mend "
            f"the reason, then hpcmlip submit --retry {experiment.folder}"
        )


def _check_config(config: RunConfig, trial: Trial) -> None:
    changed(config, trial, Path.cwd(), where=json.dumps(trial))


def _members(found: Study, config: RunConfig, asked: Sweep) -> tuple[Member, ...]:
    """Members of the trials suggested so far."""
    seeds = [{}] if asked.members == 1 else [{sweep.SEED: config.train.seed + i} for i in range(asked.members)]
    short = sweep.short_keys([*asked.optuna.draws, *seeds[0]])
    each: list[Trial] = [found.values(number) | seed for number in range(len(found.trials)) for seed in seeds]
    return tuple(Member(sweep.name(i, values, short), values) for i, values in enumerate(each))


def _check_same(asked: Sweep, path: Path, before: Experiment) -> None:
    """Raises ConfigError unless an experiment is the same sweep, of as many trials or fewer."""
    if before.growth is None:
        raise ConfigError(f"{before.folder} holds an experiment without Optuna; name another folder with --run-dir")
    old = sweep.load_sweep(before.folder / experiments.SWEEP)
    if old.optuna.trials > asked.optuna.trials:
        raise ConfigError(
            f"{before.folder} holds a sweep of {old.optuna.trials} trials, {path} asks for {asked.optuna.trials}: "
            "ask for as many or more, or name another folder with --run-dir"
        )
    if _without_number(old) != _without_number(asked):
        raise ConfigError(
            f"{path} is another sweep than the one in {before.folder} ({experiments.SWEEP} there), and only 'trials' "
            "may change; name another folder with --run-dir"
        )


def _without_number(asked: Sweep) -> Sweep:
    section: OptunaSection = asked.optuna.model_copy(update={"trials": 1})
    return asked.model_copy(update={"optuna": section})
