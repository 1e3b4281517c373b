"""`hpcmlip submit`: an ensemble as a Slurm array with a dependent evaluation, or one member after another right here.

The order is: check everything that can be known now, write the experiment directory, render the scripts, submit.
Calling it again for the same directory submits what has not finished.
"""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from hpcmlip.cluster import experiment as experiments
from hpcmlip.cluster import local as here
from hpcmlip.cluster import scheduler, script
from hpcmlip.cluster.experiment import Experiment
from hpcmlip.cluster.script import Evaluation
from hpcmlip.cluster.site import DEFAULT_FILE, Site, load_site
from hpcmlip.config import RunConfig, dump
from hpcmlip.data.dataset import Dataset
from hpcmlip.data.store import SPLITS, open_store
from hpcmlip.errors import ConfigError, RunError
from hpcmlip.plugins import suggest
from hpcmlip.training.rundir import write_atomic


@dataclass(frozen=True)
class Plan:
    """What is to be submitted."""

    members: tuple[int, ...]
    evaluate: bool


def submit(
    config: RunConfig,
    folder: Path,
    *,
    members: int,
    evaluate: Path | None,
    split: str,
    site: Path | None,
    local: bool,
    ranks: int,
    dry_run: bool,
) -> int:
    """Train `members` members of `config` in the experiment directory `folder`; exit code.

    Raises ConfigError or RunError, before anything is written, for what would fail in the queue: data, levels,
    processes that do not divide the micro-batches, a directory that holds something else.
    """
    if not local and not dry_run:
        scheduler.check_present()
    experiment = Experiment(folder.absolute(), config, members, _evaluation(folder, evaluate, split))
    site_file = _site_file(experiment, site)
    machine = load_site(site_file)
    _check_ranks(experiment, machine, ranks if local else None)
    _check_data(experiment)
    experiments.check_folder(experiment)
    if not local:
        script.check_path(experiment.folder)
    if not local and not dry_run:
        _check_queue(experiment)
    # with its comments, unless its relative path would mean another place in the copy
    text = dump(machine, defaults=False) if machine.templates else site_file.read_text(encoding="utf-8")
    experiments.write(experiment, text)
    if local:
        return _run_here(experiment, ranks, dry_run=dry_run)
    plan = plan_of(experiment)
    _write_scripts(experiment, machine, plan)
    return _submit(experiment, plan, dry_run=dry_run)


def plan_of(experiment: Experiment) -> Plan:
    """What has not finished."""
    members = tuple(experiment.unfinished())
    wanted = experiment.evaluation is not None and (bool(members) or not experiment.is_evaluated())
    return Plan(members, wanted)


def job_ids(experiment: Experiment) -> list[str]:
    """Ids of all jobs submitted for an experiment, oldest first."""
    try:
        return [job["id"] for job in json.loads((experiment.folder / "jobs.json").read_text())["jobs"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{experiment.folder / 'jobs.json'} cannot be read: {error}") from None


def _evaluation(folder: Path, store: Path | None, split: str) -> Evaluation | None:
    """The evaluation asked for, else the one that the experiment was submitted with before."""
    if store is not None:
        return Evaluation(store.absolute(), split)
    return experiments.open_experiment(folder).evaluation if (folder / experiments.RECORD).is_file() else None


def _site_file(experiment: Experiment, site: Path | None) -> Path:
    """The site named, else the one that the experiment was made with, else the package's."""
    if site is not None:
        return site
    return experiment.site_file if experiment.site_file.is_file() else DEFAULT_FILE


def _check_ranks(experiment: Experiment, site: Site, ranks: int | None) -> None:
    micro_batches = experiment.config.train.micro_batches_per_step
    if ranks is None:
        site.check_ranks(micro_batches)
    elif micro_batches % ranks:
        raise ConfigError(
            f"--ranks {ranks} does not divide train.micro_batches_per_step = {micro_batches}; change one of them"
        )


def _check_data(experiment: Experiment) -> None:
    data = experiment.config.data
    dataset = Dataset.open(data.stores, data.levels)
    for split in ("train", "val"):
        if not dataset.count(split):
            raise ConfigError(f"no structure of the split '{split}' carries a label of {', '.join(data.levels)}")
    if experiment.evaluation is not None:
        held = [level.name for level in open_store(experiment.evaluation.store).meta.levels]
        if not set(held) & set(data.levels):
            raise ConfigError(
                f"{experiment.evaluation.store} holds {', '.join(held)}, none of the trained {', '.join(data.levels)}"
            )
        split = experiment.evaluation.split
        if split not in SPLITS:
            raise ConfigError(f"there is no split '{split}'{suggest(split, SPLITS)}")


def _check_queue(experiment: Experiment) -> None:
    jobs = job_ids(experiment)
    waiting = scheduler.queued(jobs) if jobs else []
    if waiting:
        raise RunError(
            f"jobs {', '.join(waiting)} of {experiment.folder} are still in the queue; "
            "wait for them, or cancel them with scancel, and submit again"
        )


def _write_scripts(experiment: Experiment, site: Site, plan: Plan) -> None:
    name, folder = experiment.config.name, experiment.folder
    if plan.members:
        write_atomic(_path(experiment, "train"), script.train_script(site, name, folder, plan.members))
    if plan.evaluate:
        text = script.evaluate_script(site, name, folder, experiment.evaluation)
        write_atomic(_path(experiment, "evaluate"), text)


def _submit(experiment: Experiment, plan: Plan, *, dry_run: bool) -> int:
    if not plan.members and not plan.evaluate:
        print(f"All {experiment.members} members of {experiment.folder} have finished; nothing to submit.")
        return 0
    array = None
    if plan.members:
        array = _job(experiment, "train", after=None, dry_run=dry_run, members=plan.members)
        finished = experiment.members - len(plan.members)
        print(f"Training: array {array}, members {script.array_text(plan.members)}; {finished} have finished already.")
    if plan.evaluate:
        job = _job(experiment, "evaluate", after=array, dry_run=dry_run)
        print(f"Evaluation: job {job}{f', after all of {array}' if array else ''}.")
    print(f"Experiment: {experiment.folder}")
    return 0


def _job(experiment: Experiment, kind: str, *, after: str | None, dry_run: bool, members=()) -> str:
    """Submit one script and record its id; with `dry_run` the command is printed instead."""
    command = scheduler.sbatch_command(_path(experiment, kind).relative_to(experiment.folder), after=after)
    if dry_run:
        print(f"cd {shlex.quote(str(experiment.folder))} && {shlex.join(command)}")
        return f"<{kind}>"
    job = scheduler.sbatch(command, experiment.folder)
    path = experiment.folder / "jobs.json"
    jobs = json.loads(path.read_text())["jobs"] if path.exists() else []
    jobs.append({"id": job, "kind": kind, "members": list(members), "submitted": experiments.now()})
    write_atomic(path, json.dumps({"jobs": jobs}, indent=2) + "\n")
    return job


def _path(experiment: Experiment, kind: str) -> Path:
    return experiment.folder / "slurm" / f"{kind}.sbatch"


def _run_here(experiment: Experiment, ranks: int, *, dry_run: bool) -> int:
    if not dry_run:
        return here.run(experiment, ranks)
    members, evaluation = here.commands(experiment, ranks)
    for command in [*members.values(), *([evaluation] if evaluation else [])]:
        print(shlex.join(command))
    return 0
