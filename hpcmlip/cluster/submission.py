"""`hpcmlip submit`: an ensemble or a sweep as a Slurm array with a dependent evaluation, or one by one right here.

The order is: check everything that can be known now, write the experiment directory, render the scripts, submit.
Calling it again for the same directory submits what has not finished; --retry does so beside members that still run.
"""

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from hpcmlip.cluster import activity, preflight, scheduler, script, sweep, trials
from hpcmlip.cluster import experiment as experiments
from hpcmlip.cluster import local as here
from hpcmlip.cluster.activity import Activity
from hpcmlip.cluster.experiment import Experiment
from hpcmlip.cluster.script import Evaluation
from hpcmlip.cluster.site import DEFAULT_FILE, Site, load_site
from hpcmlip.config import RunConfig, dump
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.files import write_atomic


@dataclass(frozen=True)
class How:
    """Where and how members run."""

    site: Path | None = None
    """SITE.yaml; none: the one that the experiment was made with, else the package's."""
    local: bool = False
    """On this machine, without Slurm."""
    ranks: int = 1
    """Processes of a member on this machine."""
    dry_run: bool = False

    @property
    def needs_slurm(self) -> bool:
        return not self.local and not self.dry_run


@dataclass(frozen=True)
class Plan:
    """What is to be submitted."""

    members: tuple[int, ...]
    evaluate: bool
    finished: int = 0
    """Members that are."""
    after: tuple[str, ...] = ()
    """Jobs in the queue that the evaluation waits for besides."""


NOTHING = Activity({}, frozenset(), (), None)


def submit(
    config: RunConfig,
    folder: Path,
    *,
    members: int | None,
    sweep_file: Path | None,
    evaluate: Path | None,
    split: str | None,
    min_members: int | None,
    how: How,
) -> int:
    """Train `members` members of `config` (default: 1), or the trials of a sweep, in the experiment directory `folder`;
    exit code.

    Raises ConfigError or RunError, before anything is written, for what would fail in the queue: a config that the
    sweep leads to, data, levels, processes that do not divide the micro-batches, a directory of something else.
    """
    if how.needs_slurm:
        scheduler.check_present()
    before = experiments.previous(folder)
    if sweep_file is not None and members is not None:
        raise ConfigError(f"--members and --sweep were both given; write 'members: {members}' into {sweep_file}")
    asked = sweep.load_sweep(sweep_file) if sweep_file is not None else None
    growth = trials.growth(asked) if asked and asked.optuna else None
    looked_at = trials.check(asked, config, sweep_file, before) if growth else ()
    if growth:
        chosen = before.members if before else ()
    elif asked:
        chosen = sweep.members(asked, config, sweep_file, before)
    else:
        chosen = experiments.ensemble(config, members or 1)
    evaluation = _evaluation(evaluate, split, min_members, before)
    experiment = Experiment(folder.absolute(), config, chosen, evaluation, growth)
    if evaluation is not None and evaluation.min_members > experiment.size:
        raise ConfigError(
            f"--min-members {evaluation.min_members} cannot be met by {experiment.size} members; lower it"
        )
    if before is not None:
        experiments.check_goes_on(before, experiment)
    site = _check(replace(experiment, members=looked_at) if growth else experiment, how)
    if how.needs_slurm:
        _check_queue(experiment)
    experiments.write(experiment, site.text, sweep_file.read_text(encoding="utf-8") if sweep_file else None)
    if growth:
        experiment = trials.advance(experiment.folder, 0)
    return _start(experiment, site, plan_of(experiment, NOTHING), how)


def retry(folder: Path, how: How) -> int:
    """Submit the members of an experiment that have not finished and that nobody works on; exit code.

    Raises ConfigError or RunError as `submit` does.
    """
    experiment = experiments.open_experiment(folder)
    if experiment.growth:
        experiment = trials.advance(experiment.folder, 0)
    unfinished = experiment.unfinished()
    if not unfinished and (experiment.evaluation is None or experiment.is_evaluated()):
        return _say_all_finished(experiment)
    if how.needs_slurm:
        scheduler.check_present()
    now = activity.look(experiment, unfinished, _queue(experiment, how))
    plan = plan_of(experiment, now)
    if now.members:
        at_work = ", ".join(f"{experiment.name(member)} ({state})" for member, state in now.members.items())
        print(f"At work, and left alone: {at_work}.")
    if not plan.members and not plan.evaluate:
        print(f"{experiment.folder}: nothing to do.")
        return 0
    site = _check(experiment, how)
    if plan.members:
        print(f"To be trained: {', '.join(map(experiment.name, plan.members))}.")
    write_atomic(experiment.site_file, site.text)
    return _start(experiment, site, plan, how)


def plan_of(experiment: Experiment, now: Activity) -> Plan:
    """What has not finished and nobody works on."""
    unfinished = experiment.unfinished()
    members = tuple(member for member in unfinished if member not in now.members)
    # who is at work without a job cannot be waited for, and evaluates by itself in the end
    is_waited_for = not now.members or bool(now.jobs)
    is_wanted = now.evaluation is None and is_waited_for
    evaluate = experiment.evaluation is not None and (bool(members) or (is_wanted and not experiment.is_evaluated()))
    return Plan(members, evaluate, experiment.size - len(unfinished), now.jobs)


# ------------------------------------------------------------------------------------------- before it is submitted


@dataclass(frozen=True)
class _SiteFile:
    site: Site
    text: str
    """What the experiment directory keeps of it."""


def _evaluation(
    store: Path | None, split: str | None, min_members: int | None, before: Experiment | None
) -> Evaluation | None:
    """The evaluation asked for, else the one that the experiment was submitted with before."""
    if store is not None:
        return Evaluation(store.absolute(), split or "test", min_members or 1)
    if split is not None:
        raise ConfigError("--split says what part of a store is evaluated: give --evaluate STORE with it")
    if min_members is not None:
        raise ConfigError("--min-members says when to evaluate at all: give --evaluate STORE with it")
    return before.evaluation if before is not None else None


def _check(experiment: Experiment, how: How) -> _SiteFile:
    """The site to be used. Raises ConfigError or DataError for what would fail in the queue."""
    kept = experiment.site_file if experiment.site_file.is_file() else DEFAULT_FILE
    path = how.site or kept
    site = load_site(path)
    preflight.check(experiment, site, local_ranks=how.ranks if how.local else None)
    if not how.local:
        script.check_path(experiment.folder)
    # with its comments, unless its relative path would mean another place in the copy
    return _SiteFile(site, dump(site, defaults=False) if site.templates else path.read_text(encoding="utf-8"))


def _queue(experiment: Experiment, how: How) -> dict[str, str] | None:
    """State of each job and array task of the experiment in the queue; None where there is no Slurm to ask, or need."""
    try:
        return scheduler.states([job.id for job in activity.jobs(experiment)])
    except RunError:
        if how.needs_slurm:
            raise
        return None


def _check_queue(experiment: Experiment) -> None:
    now = activity.look(experiment, (), scheduler.states([job.id for job in activity.jobs(experiment)]))
    if now.jobs:
        raise RunError(
            f"jobs {', '.join(now.jobs)} of {experiment.folder} are still in the queue; wait for them, cancel them "
            "with 'hpcmlip cancel', or submit the members that nobody works on with 'hpcmlip submit --retry'"
        )


# ---------------------------------------------------------------------------------------------------------- starting


def _start(experiment: Experiment, site: _SiteFile, plan: Plan, how: How) -> int:
    if not plan.members and not plan.evaluate:
        return _say_all_finished(experiment)
    if how.local and how.dry_run:
        return _print_commands(experiment, plan, how.ranks)
    if how.local:
        return here.run(experiment, plan.members, how.ranks, evaluate=plan.evaluate)
    _write_scripts(experiment, site.site, plan)
    return _submit(experiment, site.site, plan, dry_run=how.dry_run)


def _say_all_finished(experiment: Experiment) -> int:
    print(f"All {experiment.size} members of {experiment.folder} have finished; nothing to do.")
    return 0


def _write_scripts(experiment: Experiment, site: Site, plan: Plan) -> None:
    name, folder = experiment.config.name, experiment.folder
    if plan.members:
        names = [member.name for member in experiment.members]
        is_suggested = experiment.growth is not None
        text = script.train_script(site, name, folder, names, plan.members, is_suggested=is_suggested)
        write_atomic(_path(experiment, "train"), text)
    if plan.evaluate:
        text = script.evaluate_script(site, name, folder, experiment.evaluation)
        write_atomic(_path(experiment, "evaluate"), text)


def _submit(experiment: Experiment, site: Site, plan: Plan, *, dry_run: bool) -> int:
    after = plan.after
    groups = experiment.generations(plan.members)
    # a generation waits for the one before without holding a node
    waits_for = _earlier(experiment, plan)
    for group in groups:
        tasks = script.array_text(group, site) if experiment.growth else ""
        array = _job(experiment, "train", after=waits_for, array=tasks, dry_run=dry_run, members=group)
        waits_for, after = (array,), (array, *after)
        members = script.array_text(group)
        print(f"Training: array {array}, members {members}; {plan.finished} have finished already.")
    if plan.evaluate:
        job = _job(experiment, "evaluate", after=after, dry_run=dry_run)
        waits = f", after all of {', '.join(after)}" if after else ""
        print(f"Evaluation: job {job}{waits}.")
    print(f"Experiment: {experiment.folder}")
    return 0


def _earlier(experiment: Experiment, plan: Plan) -> tuple[str, ...]:
    """Jobs in the queue that train generations before those of the plan."""
    if experiment.growth is None or not plan.members:
        return ()
    first = plan.members[0] - plan.members[0] % experiment.growth.generation
    jobs = {job.id: job for job in activity.jobs(experiment)}
    return tuple(job for job in plan.after if any(member < first for member in jobs[job].members))


def _job(experiment: Experiment, kind: str, *, dry_run: bool, after=(), array="", members=()) -> str:
    """Submit one script and record its id; with `dry_run` the command is printed instead."""
    path = _path(experiment, kind).relative_to(experiment.folder)
    command = scheduler.sbatch_command(path, after=after, array=array)
    if dry_run:
        print(f"cd {shlex.quote(str(experiment.folder))} && {shlex.join(command)}")
        return f"<{kind}{f' {array}' if array else ''}>"
    job = scheduler.sbatch(command, experiment.folder)
    path = experiment.jobs_file
    jobs = json.loads(path.read_text())["jobs"] if path.exists() else []
    jobs.append({"id": job, "kind": kind, "members": list(members), "submitted": experiments.now()})
    write_atomic(path, json.dumps({"jobs": jobs}, indent=2) + "\n")
    return job


def _path(experiment: Experiment, kind: str) -> Path:
    return experiment.folder / "slurm" / f"{kind}.sbatch"


def _print_commands(experiment: Experiment, plan: Plan, ranks: int) -> int:
    known = [member for member in plan.members if member < len(experiment.members)]
    for member in known:
        print(shlex.join(here.train_command(experiment, member, ranks)))
    if len(known) < len(plan.members):
        print(
            f"# and {len(plan.members) - len(known)} more trials, each suggested when the generation before has ended"
        )
    if plan.evaluate:
        print(shlex.join(here.evaluate_command(experiment, ranks)))
    return 0
